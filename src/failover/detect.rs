//! Whether the primary is gone. Pure.

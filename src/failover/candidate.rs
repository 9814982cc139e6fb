//! Who is promoted, or why nobody is. Pure.

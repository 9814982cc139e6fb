//! Demand + topology -> where, and why. Pure.

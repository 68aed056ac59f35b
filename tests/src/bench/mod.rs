//! Measurements: each part of the product beside something bare, in one run.

pub mod gateway;
pub mod machine;
pub mod operator;
pub mod table;

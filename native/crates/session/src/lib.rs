//! The memory shared by keeper, worker and control.

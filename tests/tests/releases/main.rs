//! Releases on real processes behind a real router: no request is lost, shares are exact, what is broken gives way.
//! Needs root: the agent makes control groups.
#![allow(clippy::unwrap_used)]

mod broken;
mod command;
mod resize;
mod support;
mod traffic;
mod whole;

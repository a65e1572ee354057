//! `OPTIMUS_PLANTED=1` builds the planted bugs in (src/planted.rs), without another build of everything we depend on.

fn main() {
    println!("cargo::rustc-check-cfg=cfg(optimus_planted)");
    println!("cargo::rerun-if-env-changed=OPTIMUS_PLANTED");
    if std::env::var_os("OPTIMUS_PLANTED").is_some() {
        println!("cargo::rustc-cfg=optimus_planted");
    }
}

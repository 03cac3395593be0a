//! Builds what Rust cannot: the gRPC types, the C++ bridge to libtorch, and the path by which
//! the binaries find libtorch without `LD_LIBRARY_PATH`.

use std::env;

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=build.rs");
    let libtorch = env::var("LIBTORCH").unwrap_or_default();
    let Ok(libtorch) = std::fs::canonicalize(&libtorch) else {
        panic!(
            "libtorch is not at '{libtorch}': run scripts/setup.sh, or set LIBTORCH to a libtorch 2.11.0"
        );
    };
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}/lib", libtorch.display());
}

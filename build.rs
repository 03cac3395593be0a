//! Builds what Rust cannot: the gRPC types, the C++ bridge to libtorch, and the path by which
//! the binaries find libtorch without `LD_LIBRARY_PATH`.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=build.rs");
    let libtorch = env::var("LIBTORCH").unwrap_or_default();
    let Ok(libtorch) = std::fs::canonicalize(&libtorch) else {
        panic!(
            "libtorch is not at '{libtorch}': run scripts/setup.sh, or set LIBTORCH to a libtorch 2.11.0"
        );
    };
    bridge(&libtorch);
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}/lib", libtorch.display());
}

/// Compiles every `.cpp` of the bridge into one static library.
fn bridge(libtorch: &Path) {
    let mut sources: Vec<PathBuf> = Vec::new();
    for folder in ["src/bridge/c10d", "src/bridge/ops"] {
        println!("cargo:rerun-if-changed={folder}");
        let Ok(entries) = std::fs::read_dir(folder) else { continue };
        for entry in entries.flatten() {
            let path = entry.path();
            println!("cargo:rerun-if-changed={}", path.display());
            if path.extension().is_some_and(|e| e == "cpp") {
                sources.push(path);
            }
        }
    }
    sources.sort();
    if sources.is_empty() {
        return;
    }
    cc::Build::new()
        .cpp(true)
        .files(&sources)
        .include(libtorch.join("include"))
        .include(libtorch.join("include/torch/csrc/api/include"))
        .flag("-std=c++17")
        // The kernels of ops/ are worth their optimisation in a debug build too.
        .opt_level(3)
        .flag("-fopenmp")
        .flag("-ffp-contract=fast")
        .flag("-fno-math-errno")
        .flag("-fno-trapping-math")
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .warnings(false)
        .compile("cpcr_bridge");
    for lib in ["torch_cpu", "c10"] {
        println!("cargo:rustc-link-lib=dylib={lib}");
    }
    println!("cargo:rustc-link-search=native={}/lib", libtorch.display());
    // libtorch's own OpenMP runtime: a second one in the process would fight it for the cores.
    println!("cargo:rustc-link-arg=-Wl,--as-needed");
    println!("cargo:rustc-link-arg={}/lib/libgomp.so.1", libtorch.display());
}

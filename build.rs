//! Builds what Rust cannot: the gRPC types, the C++ bridge to libtorch, and the path by which
//! the binaries find libtorch without `LD_LIBRARY_PATH`.

// A build that cannot go on says so by panicking: cargo shows it.
#![allow(clippy::panic)]

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
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}/lib", libtorch.display());
    compile_bridge(&libtorch);
    hide_cpp_symbols();
}

/// Keeps the executables' C++ symbols to themselves. Inline functions of libtorch's headers are
/// in the bridge's objects too; as libtorch has the same ones, the linker would export them, hold
/// what is exported to be in use, and so link libtorch into binaries that never touch a tensor.
/// Capital `N`: `operator new` (`_Znwm`) and C names such as `malloc` stay visible, for it is by
/// them that libtorch uses the allocator linked into the executable.
fn hide_cpp_symbols() {
    let out = env::var("OUT_DIR").unwrap_or_default();
    let script = Path::new(&out).join("exports.map");
    if let Err(error) = std::fs::write(&script, "{ local: _ZN*; _ZT*; _ZG*; _ZZ*; };\n") {
        panic!("write {}: {error}", script.display());
    }
    println!("cargo:rustc-link-arg=-Wl,--version-script={}", script.display());
}

/// One static library from every `.cpp` of the bridge but `src/bridge/nccl`, which needs CUDA's
/// headers and is its own shared object (`scripts/build-nccl.sh`).
fn compile_bridge(libtorch: &Path) {
    let bridge = Path::new("src/bridge");
    let mut sources = Vec::new();
    for folder in ["c10d", "ops"] {
        sources.extend(cpp_files(&bridge.join(folder)));
    }
    println!("cargo:rerun-if-changed=src/bridge/gloo_headers");
    let include = libtorch.join("include");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").define("USE_C10D_GLOO", None).flag("-Wall").flag("-Wextra");
    // As system headers, so that only this project's own warnings show.
    for folder in [include.clone(), include.join("torch/csrc/api/include")] {
        build.flag("-isystem").flag(folder);
    }
    build.flag("-isystem").flag(bridge.join("gloo_headers"));
    build.files(sources).compile("cpcr_bridge");
    // Before torch-sys's own list, which begins with torch_cuda: what both have would be taken
    // from there, and every binary would want CUDA's libraries.
    println!("cargo:rustc-link-search=native={}/lib", libtorch.display());
    for library in ["torch_cpu", "c10"] {
        println!("cargo:rustc-link-lib=dylib={library}");
    }
}

/// The C++ sources of `folder` in a stable order; none if there is no such folder.
fn cpp_files(folder: &Path) -> Vec<PathBuf> {
    println!("cargo:rerun-if-changed={}", folder.display());
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "cpp"))
        .collect();
    files.sort();
    files
}

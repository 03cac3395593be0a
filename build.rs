//! Builds what Rust cannot: the gRPC types, the C++ bridge to libtorch, and the path by which
//! the binaries find libtorch without `LD_LIBRARY_PATH`.
#![allow(clippy::panic)] // A build script reports by panicking: cargo prints the message.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-changed=build.rs");
    let link = PathBuf::from(env::var("LIBTORCH").unwrap_or_default());
    let Ok(libtorch) = std::fs::canonicalize(&link) else {
        panic!(
            "libtorch is not at '{}': run scripts/setup.sh, or set LIBTORCH to a libtorch 2.11.0",
            link.display()
        );
    };
    // `.libtorch` may point elsewhere tomorrow (CPU to CUDA): a binary that found one half of itself
    // in the old place and the other in the new one would crash.
    println!("cargo:rerun-if-changed={}", link.join("lib/libtorch_cpu.so").display());
    compile_wire();
    compile_bridge(&libtorch);
    // Installed (scripts/install.sh), it is beside the binaries; here it is where it was fetched to.
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/../lib/cpcr/torch/lib");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}/lib", libtorch.display());
    hide_cpp_symbols();
}

/// Generates the gRPC types: protox reads the `.proto`, so no protoc is needed.
fn compile_wire() {
    println!("cargo:rerun-if-changed=src/proto/control.proto");
    let descriptors = protox::compile(["control.proto"], ["src/proto"])
        .unwrap_or_else(|error| panic!("src/proto/control.proto: {error}"));
    tonic_prost_build::configure()
        .codec_path("crate::proto::codec::SmallCodec")
        .compile_fds(descriptors)
        .unwrap_or_else(|error| panic!("generating the gRPC types: {error}"));
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

/// Two static libraries from the bridge's sources, all but `src/bridge/nccl`, which needs CUDA's
/// headers and is its own shared object (`scripts/build-nccl.sh`).
fn compile_bridge(libtorch: &Path) {
    println!("cargo:rerun-if-changed=src/bridge/gloo_headers");
    cpp(libtorch)
        .define("USE_C10D_GLOO", None)
        .files(cpp_files(Path::new("src/bridge/c10d")))
        .compile("cpcr_bridge");
    // The kernels are worth their optimisation in a debug build too.
    cpp(libtorch)
        .opt_level(3)
        .flag("-fopenmp")
        .flag("-ffp-contract=fast")
        .flag("-fno-math-errno")
        .flag("-fno-trapping-math")
        .files(cpp_files(Path::new("src/bridge/ops")))
        .compile("cpcr_ops");
    // Before torch-sys's own list, which begins with torch_cuda: what both have would be taken
    // from there, and every binary would want CUDA's libraries.
    println!("cargo:rustc-link-search=native={}/lib", libtorch.display());
    for library in ["torch_cpu", "c10"] {
        println!("cargo:rustc-link-lib=dylib={library}");
    }
    // libtorch's own OpenMP runtime: a second one in the process would fight it for the cores.
    println!("cargo:rustc-link-arg=-Wl,--as-needed");
    println!("cargo:rustc-link-arg={}/lib/libgomp.so.1", libtorch.display());
}

/// A C++ build with libtorch's headers as system headers, so that only our own warnings show.
fn cpp(libtorch: &Path) -> cc::Build {
    let include = libtorch.join("include");
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").flag("-Wall").flag("-Wextra");
    for folder in [include.clone(), include.join("torch/csrc/api/include")] {
        build.flag("-isystem").flag(folder);
    }
    build.flag("-isystem").flag("src/bridge/gloo_headers");
    build
}

/// The C++ sources of `folder` in a stable order.
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

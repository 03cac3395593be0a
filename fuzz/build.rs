//! The linker's arguments of ../build.rs do not reach a package that depends on it: libtorch's own OpenMP runtime once more.

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    if let Ok(libtorch) = std::env::var("LIBTORCH") {
        println!("cargo:rustc-link-arg=-Wl,--as-needed");
        println!("cargo:rustc-link-arg={libtorch}/lib/libgomp.so.1");
    }
}

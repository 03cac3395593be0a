// A TorchScript module from named tensors and the source of its `forward`, as the bytes of a file
// that torch.jit.load reads: tch can load such modules, and cannot make them.
#include "ops.h"

#include <torch/csrc/jit/api/module.h>

#include <algorithm>
#include <map>
#include <memory>
#include <sstream>
#include <string>

namespace cpcr {
namespace {

using torch::jit::Module;

// Modules by their path; the root's is empty. Each has a class of its own, as weights are attributes.
struct Tree {
  std::shared_ptr<torch::jit::CompilationUnit> unit =
      std::make_shared<torch::jit::CompilationUnit>();
  std::map<std::string, Module> modules;

  Module& at(const std::string& path) {
    auto found = modules.find(path);
    if (found != modules.end()) return found->second;
    std::string name = "__torch__.cpcr.Network";
    if (!path.empty()) name += "_" + path;
    // "__torch__" and "cpcr" are the only packages: a dot further on would make more of them.
    std::replace(name.begin() + 15, name.end(), '.', '_');
    Module made(c10::QualifiedName(name), unit);
    made.register_attribute("training", c10::BoolType::get(), false);
    if (!path.empty()) {
      auto [parent, leaf] = split(path);
      at(parent).register_module(leaf, made);
    }
    return modules.emplace(path, made).first->second;
  }

  static std::pair<std::string, std::string> split(const std::string& path) {
    auto dot = path.rfind('.');
    if (dot == std::string::npos) return {"", path};
    return {path.substr(0, dot), path.substr(dot + 1)};
  }
};

}  // namespace
}  // namespace cpcr

using namespace cpcr;

extern "C" int cpcr_ops_script(const char* const* names, at::Tensor* const* tensors,
                               const int* are_buffers, int64_t n, const char* source,
                               at::Tensor** out) {
  return guarded([&] {
    Tree tree;
    for (int64_t i = 0; i < n; ++i) {
      auto [path, leaf] = Tree::split(names[i]);
      auto value = tensors[i]->detach().contiguous();
      tree.at(path).register_parameter(leaf, value, are_buffers[i] != 0);
    }
    Module& root = tree.at("");
    root.define(source);
    std::ostringstream file;
    root.save(file);
    std::string bytes = file.str();
    auto made = at::empty({int64_t(bytes.size())}, at::kByte);
    std::memcpy(made.data_ptr<uint8_t>(), bytes.data(), bytes.size());
    *out = new at::Tensor(made);
  });
}

// What stands behind Rust's opaque handles: a process group and a piece of work in it.
#pragma once
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

struct CpcrGroup {
  // What the Reducer wants: dispatches on the tensor's device to `backend`.
  c10::intrusive_ptr<c10d::ProcessGroup> group;
  // What collectives are called on directly, without the dispatcher.
  c10::intrusive_ptr<c10d::Backend> backend;
  // Fails everything pending, promptly; from any thread; may be called again.
  void (*abort)(c10d::Backend& backend);
};

struct CpcrWork {
  c10::intrusive_ptr<c10d::Work> work;
};

namespace cpcr {

// Wraps `backend` so that both the Reducer and direct calls reach it.
inline CpcrGroup* wrap_group(
    c10::intrusive_ptr<c10d::Store> store,
    c10::intrusive_ptr<c10d::Backend> backend,
    c10::DeviceType device,
    c10d::ProcessGroup::BackendType kind,
    void (*abort)(c10d::Backend&)) {
  auto group = c10::make_intrusive<c10d::ProcessGroup>(std::move(store), backend->getRank(), backend->getSize());
  group->setBackend(device, kind, backend);
  group->setDefaultBackend(kind);
  return new CpcrGroup{std::move(group), std::move(backend), abort};
}

} // namespace cpcr

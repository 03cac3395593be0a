// Process groups and their collectives. Gloo is made here; NCCL in ../nccl, behind the same handle.
#include <gloo/transport/tcp/pair.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include "group.h"
#include "guard.h"
#include "store.h"

namespace {

using c10d::ProcessGroupGloo;

// Reads a protected member by its name, without a subclass to construct.
struct Contexts : ProcessGroupGloo {
  static const std::vector<std::shared_ptr<gloo::Context>>& of(ProcessGroupGloo& group) {
    return group.*(&Contexts::contexts_);
  }
};

// c10d has no abort for Gloo: fail each connection as Gloo does itself when one times out.
void abort_gloo(c10d::Backend& backend) {
  auto& group = static_cast<ProcessGroupGloo&>(backend);
  for (const auto& context : Contexts::of(group)) {
    for (int peer = 0; peer < group.getSize(); ++peer) {
      if (peer == group.getRank()) {
        continue;
      }
      auto& pair = context->getPair(peer);
      if (pair) {
        // createDeviceForHostname makes TCP devices only, whose pairs are tcp::Pair.
        reinterpret_cast<gloo::transport::tcp::Pair*>(pair.get())->signalExceptionExternal("cpcr: group aborted");
      }
    }
  }
}

std::vector<at::Tensor> list(const at::Tensor* tensor) {
  return {*tensor};
}

} // namespace

extern "C" {

int cpcr_store_new(const CpcrStoreTable* table, int64_t timeout_ms, const char* prefix, c10d::Store** out) {
  return cpcr::guarded([&] {
    auto store = cpcr::make_store(*table, std::chrono::milliseconds(timeout_ms));
    *out = c10::make_intrusive<c10d::PrefixStore>(prefix, std::move(store)).release();
  });
}

void cpcr_store_free(c10d::Store* store) {
  cpcr::quietly([&] { c10::intrusive_ptr<c10d::Store>::reclaim(store); });
}

int cpcr_gloo_new(
    c10d::Store* store, int rank, int size, int64_t timeout_ms, const char* address, CpcrGroup** out) {
  return cpcr::guarded([&] {
    auto shared = c10::intrusive_ptr<c10d::Store>::reclaim_copy(store);
    auto options = ProcessGroupGloo::Options::create(std::chrono::milliseconds(timeout_ms));
    options->devices.push_back(ProcessGroupGloo::createDeviceForHostname(address, false));
    auto backend = c10::make_intrusive<ProcessGroupGloo>(shared, rank, size, options);
    *out = cpcr::wrap_group(
        std::move(shared), std::move(backend), c10::DeviceType::CPU, c10d::ProcessGroup::BackendType::GLOO, abort_gloo);
  });
}

int cpcr_group_abort(CpcrGroup* group) {
  return cpcr::guarded([&] { group->abort(*group->backend); });
}

void cpcr_group_free(CpcrGroup* group) {
  cpcr::quietly([&] { delete group; });
}

int cpcr_all_reduce(CpcrGroup* group, const at::Tensor* tensor, int op, CpcrWork** out) {
  return cpcr::guarded([&] {
    c10d::AllreduceOptions options;
    options.reduceOp = static_cast<c10d::ReduceOp::RedOpType>(op);
    auto tensors = list(tensor);
    *out = new CpcrWork{group->backend->allreduce(tensors, options)};
  });
}

int cpcr_broadcast(CpcrGroup* group, const at::Tensor* tensor, int root, CpcrWork** out) {
  return cpcr::guarded([&] {
    c10d::BroadcastOptions options;
    options.rootRank = root;
    auto tensors = list(tensor);
    *out = new CpcrWork{group->backend->broadcast(tensors, options)};
  });
}

int cpcr_all_gather(
    CpcrGroup* group, const at::Tensor* tensor, const at::Tensor* const* outputs, size_t count, CpcrWork** out) {
  return cpcr::guarded([&] {
    std::vector<std::vector<at::Tensor>> gathered(1);
    for (size_t i = 0; i < count; ++i) {
      gathered[0].push_back(*outputs[i]);
    }
    auto tensors = list(tensor);
    *out = new CpcrWork{group->backend->allgather(gathered, tensors)};
  });
}

int cpcr_barrier(CpcrGroup* group, CpcrWork** out) {
  return cpcr::guarded([&] { *out = new CpcrWork{group->backend->barrier()}; });
}

int cpcr_work_wait(CpcrWork* work) {
  return cpcr::guarded([&] { TORCH_CHECK(work->work->wait(), "the operation was aborted"); });
}

int cpcr_work_completed(CpcrWork* work, int* out) {
  return cpcr::guarded([&] { *out = work->work->isCompleted() ? 1 : 0; });
}

void cpcr_work_free(CpcrWork* work) {
  cpcr::quietly([&] { delete work; });
}

} // extern "C"

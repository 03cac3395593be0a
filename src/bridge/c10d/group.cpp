// Process groups' collectives, and the store they meet at. Gloo is made in gloo.cpp; NCCL in ../nccl, behind the same handle.
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>

#include "group.h"
#include "guard.h"
#include "store.h"

namespace {

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

// NCCL process groups, as a shared object of their own (scripts/build-nccl.sh), so that nothing
// else here needs CUDA's headers or links its libraries. One entry, opened by c10d/nccl.rs.
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

#include <c10/core/DeviceGuard.h>

#include <cstring>

#include "../c10d/group.h"
#include "../c10d/guard.h"

namespace {

void abort_nccl(c10d::Backend& backend) {
  backend.abort();
}

} // namespace

extern "C" const char* cpcr_last_error();

// The store is borrowed. On failure `message` holds why, cut to fit.
extern "C" __attribute__((visibility("default"))) int cpcr_nccl_new(
    c10d::Store* store,
    int rank,
    int size,
    int64_t timeout_ms,
    int device,
    char* message,
    size_t message_bytes,
    CpcrGroup** out) {
  const int code = cpcr::guarded([&] {
    using c10d::ProcessGroupNCCL;
    const c10::Device place(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
    // By the registry, not CUDAGuard, whose inline code wants libcudart.
    const c10::DeviceGuard guard(place);
    auto shared = c10::intrusive_ptr<c10d::Store>::reclaim_copy(store);
    auto options = ProcessGroupNCCL::Options::create();
    options->timeout = std::chrono::milliseconds(timeout_ms);
    auto backend = c10::make_intrusive<ProcessGroupNCCL>(shared, rank, size, options);
    // Connect now, as Gloo does: a missing peer is then an error of joining.
    backend->eagerConnectSingleDevice(place);
    *out = cpcr::wrap_group(
        std::move(shared), backend, c10::DeviceType::CUDA, c10d::ProcessGroup::BackendType::NCCL, abort_nccl);
    backend->setBoundDeviceId(place);
  });
  if (code != cpcr::kOk) {
    std::strncpy(message, cpcr_last_error(), message_bytes - 1);
  }
  return code;
}

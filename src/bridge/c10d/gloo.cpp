// Gloo's process groups, with an abort that frees whoever waits.
//
// Gloo can fail a connection, but leaves a partly written send to its timeout: the thread in it waits that long. So nobody
// waits for that thread here. Each operation has a future of its own, which ends with Gloo's or with the abort, whichever
// comes first; what Gloo still holds of its tensors is kept alive by Gloo's own work.
#include <gloo/transport/tcp/pair.h>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include <atomic>
#include <stdexcept>
#include <unordered_set>

#include "group.h"
#include "guard.h"

namespace {

using c10::ivalue::Future;
using c10d::ProcessGroupGloo;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

constexpr const char* kAborted = "cpcr: group aborted";

std::exception_ptr aborted() {
  return std::make_exception_ptr(std::runtime_error(kAborted));
}

// Reads a protected member by its name, without a subclass to construct.
struct Contexts : ProcessGroupGloo {
  static const std::vector<std::shared_ptr<gloo::Context>>& of(ProcessGroupGloo& group) {
    return group.*(&Contexts::contexts_);
  }
};

// An operation as its caller sees it.
class Operation : public c10d::Work {
 public:
  Operation() : future_(c10::make_intrusive<Future>(c10::ListType::create(c10::TensorType::get()))) {}

  bool isCompleted() override {
    return future_->completed();
  }
  bool isSuccess() const override {
    return future_->hasValue();
  }
  std::exception_ptr exception() const override {
    return future_->exception_ptr();
  }
  bool wait(std::chrono::milliseconds) override {
    future_->waitAndThrow();
    return true;
  }
  c10::intrusive_ptr<Future> getFuture() override {
    return future_;
  }

  // The first end counts.
  void end(Future& other) {
    if (!ended_.exchange(true)) {
      other.hasError() ? future_->setError(other.exception_ptr()) : future_->markCompleted(other.constValue());
    }
  }
  void end(std::exception_ptr error) {
    if (!ended_.exchange(true)) {
      future_->setError(std::move(error));
    }
  }

 private:
  std::atomic<bool> ended_{false};
  c10::intrusive_ptr<Future> future_;
};

// What was started and has not ended. Shared with Gloo's threads, which may outlive the group's last user.
class Pending {
 public:
  void add(const c10::intrusive_ptr<Operation>& operation) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (aborted_) {
      operation->end(aborted());
    } else {
      operations_.insert(operation);
    }
  }

  void remove(const c10::intrusive_ptr<Operation>& operation) {
    const std::lock_guard<std::mutex> lock(mutex_);
    operations_.erase(operation);
  }

  void abort() {
    std::unordered_set<c10::intrusive_ptr<Operation>> all;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      aborted_ = true;
      all.swap(operations_);
    }
    // Whoever waited may go on at once: not under the lock.
    for (const auto& operation : all) {
      operation->end(aborted());
    }
  }

 private:
  std::mutex mutex_;
  bool aborted_ = false;
  std::unordered_set<c10::intrusive_ptr<Operation>> operations_;
};

class AbortableGloo : public c10d::Backend {
 public:
  explicit AbortableGloo(c10::intrusive_ptr<ProcessGroupGloo> gloo)
      : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)), pending_(std::make_shared<Pending>()) {}

  const std::string getBackendName() const override {
    return "gloo";
  }

  WorkPtr allreduce(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) override {
    return follow(gloo_->allreduce(tensors, options));
  }
  WorkPtr broadcast(std::vector<at::Tensor>& tensors, const c10d::BroadcastOptions& options) override {
    return follow(gloo_->broadcast(tensors, options));
  }
  WorkPtr allgather(
      std::vector<std::vector<at::Tensor>>& outputs,
      std::vector<at::Tensor>& inputs,
      const c10d::AllgatherOptions& options) override {
    return follow(gloo_->allgather(outputs, inputs, options));
  }
  WorkPtr barrier(const c10d::BarrierOptions& options) override {
    return follow(gloo_->barrier(options));
  }

  // c10d has no abort for Gloo: fail each connection as Gloo does itself when one times out, then whoever waits.
  void abort() override {
    for (const auto& context : Contexts::of(*gloo_)) {
      for (int peer = 0; peer < getSize(); ++peer) {
        if (peer == getRank()) {
          continue;
        }
        auto& pair = context->getPair(peer);
        if (pair) {
          // createDeviceForHostname makes TCP devices only, whose pairs are tcp::Pair.
          reinterpret_cast<gloo::transport::tcp::Pair*>(pair.get())->signalExceptionExternal(kAborted);
        }
      }
    }
    pending_->abort();
  }

 private:
  WorkPtr follow(const WorkPtr& work) {
    auto operation = c10::make_intrusive<Operation>();
    pending_->add(operation);
    work->getFuture()->addCallback([operation, pending = pending_](Future& future) {
      operation->end(future);
      pending->remove(operation);
    });
    return operation;
  }

  c10::intrusive_ptr<ProcessGroupGloo> gloo_;
  std::shared_ptr<Pending> pending_;
};

void abort_gloo(c10d::Backend& backend) {
  backend.abort();
}

} // namespace

extern "C" {

int cpcr_gloo_new(
    c10d::Store* store, int rank, int size, int64_t timeout_ms, const char* address, CpcrGroup** out) {
  return cpcr::guarded([&] {
    auto shared = c10::intrusive_ptr<c10d::Store>::reclaim_copy(store);
    auto options = ProcessGroupGloo::Options::create(std::chrono::milliseconds(timeout_ms));
    options->devices.push_back(ProcessGroupGloo::createDeviceForHostname(address, false));
    auto gloo = c10::make_intrusive<ProcessGroupGloo>(shared, rank, size, options);
    auto backend = c10::make_intrusive<AbortableGloo>(std::move(gloo));
    *out = cpcr::wrap_group(
        std::move(shared), std::move(backend), c10::DeviceType::CPU, c10d::ProcessGroup::BackendType::GLOO, abort_gloo);
  });
}

} // extern "C"

// The bridge to libtorch's c10d: a store that calls back into Rust, a process group, collectives
// and the Reducer. Every entry catches everything and answers with a code; the message stays in
// a thread-local until the next failing call on that thread.
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/reducer.hpp>

namespace {

enum Code : int32_t { kOk = 0, kFailed = 1, kTimeout = 2, kPeerLost = 3, kAborted = 4 };

thread_local std::string last_error;

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

// c10d and Gloo tell these apart by their words alone: their own types are not exported.
int32_t classify(const std::string& text) {
  if (has(text, "imed out") || has(text, "imeout")) return kTimeout;
  if (has(text, "onnection closed") || has(text, "onnection reset") || has(text, "roken pipe") ||
      has(text, "onnection refused") || has(text, "onnect failed") || has(text, "key-value service is gone"))
    return kPeerLost;
  if (has(text, "bort")) return kAborted;
  return kFailed;
}

template <typename F>
int32_t guard(F&& body) noexcept {
  try {
    body();
    return kOk;
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "an exception of unknown type";
  }
  // Only the first line: the rest is a C++ backtrace.
  last_error = last_error.substr(0, last_error.find('\n'));
  return classify(last_error);
}

}  // namespace

extern "C" {

// What a store is made of on the Rust side. Each function answers 0, or 2 (timed out), or 3 (the
// service is gone); bytes come back through `sink(out, data, length)`.
struct CpcrKv {
  void* context;
  int32_t (*set)(void*, const char*, size_t, const uint8_t*, size_t);
  int32_t (*get)(void*, const char*, size_t, int64_t, void (*)(void*, const uint8_t*, size_t), void*);
  int32_t (*wait)(void*, const char*, size_t, int64_t);
  int32_t (*add)(void*, const char*, size_t, int64_t, int64_t*);
  int32_t (*compare_set)(void*, const char*, size_t, const uint8_t*, size_t, const uint8_t*, size_t,
                         void (*)(void*, const uint8_t*, size_t), void*);
  int32_t (*check)(void*, const char*, size_t, int32_t*);
  int32_t (*remove)(void*, const char*, size_t, int32_t*);
  int32_t (*count)(void*, int64_t*);
  void (*release)(void*);
};
}

namespace {

void sink(void* out, const uint8_t* data, size_t length) {
  static_cast<std::vector<uint8_t>*>(out)->assign(data, data + length);
}

class RustStore : public c10d::Store {
 public:
  RustStore(CpcrKv kv, std::chrono::milliseconds timeout)
      : Store(timeout), kv_(std::shared_ptr<CpcrKv>(new CpcrKv(kv), [](CpcrKv* p) {
          p->release(p->context);
          delete p;
        })) {}

  c10::intrusive_ptr<Store> clone() override { return c10::make_intrusive<RustStore>(*this); }

  void set(const std::string& key, const std::vector<uint8_t>& value) override {
    answer(kv_->set(kv_->context, key.data(), key.size(), value.data(), value.size()), "set", key);
  }
  std::vector<uint8_t> get(const std::string& key) override {
    std::vector<uint8_t> value;
    answer(kv_->get(kv_->context, key.data(), key.size(), timeout_.count(), sink, &value), "get", key);
    return value;
  }
  std::vector<uint8_t> compareSet(const std::string& key, const std::vector<uint8_t>& expected,
                                  const std::vector<uint8_t>& desired) override {
    std::vector<uint8_t> value;
    answer(kv_->compare_set(kv_->context, key.data(), key.size(), expected.data(), expected.size(),
                            desired.data(), desired.size(), sink, &value),
           "compare_set", key);
    return value;
  }
  int64_t add(const std::string& key, int64_t value) override {
    int64_t sum = 0;
    answer(kv_->add(kv_->context, key.data(), key.size(), value, &sum), "add", key);
    return sum;
  }
  bool deleteKey(const std::string& key) override {
    int32_t removed = 0;
    answer(kv_->remove(kv_->context, key.data(), key.size(), &removed), "delete", key);
    return removed != 0;
  }
  bool check(const std::vector<std::string>& keys) override {
    for (const auto& key : keys) {
      int32_t present = 0;
      answer(kv_->check(kv_->context, key.data(), key.size(), &present), "check", key);
      if (present == 0) return false;
    }
    return true;
  }
  int64_t getNumKeys() override {
    int64_t count = 0;
    answer(kv_->count(kv_->context, &count), "count", "");
    return count;
  }
  void wait(const std::vector<std::string>& keys) override { wait(keys, timeout_); }
  void wait(const std::vector<std::string>& keys, const std::chrono::milliseconds& timeout) override {
    for (const auto& key : keys)
      answer(kv_->wait(kv_->context, key.data(), key.size(), timeout.count()), "wait", key);
  }

 private:
  static void answer(int32_t code, const char* what, const std::string& key) {
    if (code == 0) return;
    if (code == kTimeout)
      C10_THROW_ERROR(DistStoreError, std::string(what) + " '" + key + "': timed out");
    C10_THROW_ERROR(DistStoreError, std::string(what) + " '" + key + "': the key-value service is gone");
  }
  std::shared_ptr<CpcrKv> kv_;
};

struct Group {
  c10::intrusive_ptr<c10d::ProcessGroup> group;
};
struct PendingWork {
  c10::intrusive_ptr<c10d::Work> work;
};

void hand_over(PendingWork** out, c10::intrusive_ptr<c10d::Work> work) {
  *out = new PendingWork{std::move(work)};
}

}  // namespace

extern "C" {

const char* cpcr_c10d_last_error() { return last_error.c_str(); }

// Takes over `kv` whatever the outcome.
int32_t cpcr_group_gloo(CpcrKv kv, const char* prefix, int32_t rank, int32_t world, int64_t timeout_ms,
                        const char* interface, Group** out) {
  return guard([&] {
    auto timeout = std::chrono::milliseconds(timeout_ms);
    c10::intrusive_ptr<c10d::Store> base = c10::make_intrusive<RustStore>(kv, timeout);
    c10::intrusive_ptr<c10d::Store> store = c10::make_intrusive<c10d::PrefixStore>(prefix, base);
    auto options = c10d::ProcessGroupGloo::Options::create(timeout);
    options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(interface));
    auto gloo = c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, world, options);
    auto group = c10::make_intrusive<c10d::ProcessGroup>(store, rank, world);
    group->setBackend(at::DeviceType::CPU, c10d::ProcessGroup::BackendType::GLOO, gloo);
    group->setDefaultBackend(c10d::ProcessGroup::BackendType::GLOO);
    *out = new Group{std::move(group)};
  });
}

int32_t cpcr_group_free(Group* group) {
  return guard([&] { delete group; });
}

// op: 0 sum, 1 max, 2 min
int32_t cpcr_all_reduce(Group* group, const at::Tensor* tensor, int32_t op, PendingWork** out) {
  return guard([&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::AllreduceOptions options;
    options.reduceOp = op == 0   ? c10d::ReduceOp::SUM
                       : op == 1 ? c10d::ReduceOp::MAX
                                 : c10d::ReduceOp::MIN;
    hand_over(out, group->group->allreduce(tensors, options));
  });
}

int32_t cpcr_broadcast(Group* group, const at::Tensor* tensor, int32_t root, PendingWork** out) {
  return guard([&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    options.rootTensor = 0;
    hand_over(out, group->group->broadcast(tensors, options));
  });
}

// `outputs` are `world` tensors shaped like `input`.
int32_t cpcr_all_gather(Group* group, const at::Tensor* const* outputs, size_t n, const at::Tensor* input,
                        PendingWork** out) {
  return guard([&] {
    std::vector<std::vector<at::Tensor>> lists(1);
    for (size_t i = 0; i < n; ++i) lists[0].push_back(*outputs[i]);
    std::vector<at::Tensor> inputs{*input};
    hand_over(out, group->group->allgather(lists, inputs));
  });
}

int32_t cpcr_barrier(Group* group, PendingWork** out) {
  return guard([&] { hand_over(out, group->group->barrier()); });
}

int32_t cpcr_work_wait(PendingWork* work) {
  return guard([&] { work->work->wait(); });
}

void cpcr_work_free(PendingWork* work) {
  guard([&] { delete work; });
}

// Buckets are a function of the parameter list alone (reverse order, a small first one), and
// rebuild_buckets is never called: so a resumed run adds up in the same order.
int32_t cpcr_reducer_new(const at::Tensor* const* parameters, size_t n, Group* group, int64_t first_bytes,
                         int64_t bucket_bytes, c10d::Reducer** out) {
  return guard([&] {
    std::vector<at::Tensor> list;
    for (size_t i = 0; i < n; ++i) list.push_back(*parameters[i]);
    std::vector<at::Tensor> reversed(list.rbegin(), list.rend());
    std::vector<int64_t> indices;
    for (size_t i = 0; i < n; ++i) indices.push_back(static_cast<int64_t>(n - 1 - i));
    auto buckets = std::get<0>(c10d::compute_bucket_assignment_by_size(
        reversed, {static_cast<size_t>(first_bytes), static_cast<size_t>(bucket_bytes)},
        std::vector<bool>(n, false), indices));
    *out = new c10d::Reducer(std::move(list), std::move(buckets), group->group, std::vector<bool>(n, false),
                             bucket_bytes, /*find_unused_parameters=*/false, /*gradient_as_bucket_view=*/true,
                             {}, first_bytes, /*skip_all_reduce_unused_params=*/false,
                             /*use_python_reducer=*/false, {});
  });
}

int32_t cpcr_reducer_prepare(c10d::Reducer* reducer) {
  return guard([&] { reducer->prepare_for_backward({}); });
}

int32_t cpcr_reducer_free(c10d::Reducer* reducer) {
  return guard([&] { delete reducer; });
}
}

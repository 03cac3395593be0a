#include "store.h"

#include <memory>

#include "guard.h"

namespace cpcr {
namespace {

CpcrSlice slice(const std::string& text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

CpcrSlice slice(const std::vector<uint8_t>& bytes) {
  return {bytes.data(), bytes.size()};
}

std::vector<CpcrSlice> slices(const std::vector<std::string>& keys) {
  std::vector<CpcrSlice> out;
  out.reserve(keys.size());
  for (const auto& key : keys) {
    out.push_back(slice(key));
  }
  return out;
}

void check(int code, const CpcrSink& sink) {
  if (code != kOk) {
    throw StoreFailure(code, sink.error);
  }
}

// The Rust side, freed when the last clone of the store goes.
class Keys {
 public:
  explicit Keys(const CpcrStoreTable& table) : table(table) {}
  Keys(const Keys&) = delete;
  Keys& operator=(const Keys&) = delete;
  ~Keys() {
    table.release(table.context);
  }
  const CpcrStoreTable table;
};

class RustStore final : public c10d::Store {
 public:
  RustStore(std::shared_ptr<Keys> keys, std::chrono::milliseconds timeout)
      : c10d::Store(timeout), keys_(std::move(keys)) {}

  using c10d::Store::compareSet;
  using c10d::Store::set;

  c10::intrusive_ptr<c10d::Store> clone() override {
    return c10::make_intrusive<RustStore>(keys_, timeout_);
  }

  void set(const std::string& key, const std::vector<uint8_t>& value) override {
    CpcrSink sink;
    check(table().set(table().context, slice(key), slice(value), &sink), sink);
  }

  std::vector<uint8_t> compareSet(
      const std::string& key,
      const std::vector<uint8_t>& expected,
      const std::vector<uint8_t>& desired) override {
    CpcrSink sink;
    check(table().compare_set(table().context, slice(key), slice(expected), slice(desired), &sink), sink);
    return std::move(sink.value);
  }

  std::vector<uint8_t> get(const std::string& key) override {
    CpcrSink sink;
    check(table().get(table().context, slice(key), timeout_.count(), &sink), sink);
    return std::move(sink.value);
  }

  int64_t add(const std::string& key, int64_t delta) override {
    CpcrSink sink;
    int64_t result = 0;
    check(table().add(table().context, slice(key), delta, &result, &sink), sink);
    return result;
  }

  bool deleteKey(const std::string& key) override {
    CpcrSink sink;
    int64_t result = 0;
    cpcr::check(table().remove(table().context, slice(key), &result, &sink), sink);
    return result != 0;
  }

  bool check(const std::vector<std::string>& keys) override {
    CpcrSink sink;
    int64_t result = 0;
    const auto list = slices(keys);
    check(table().check(table().context, list.data(), list.size(), &result, &sink), sink);
    return result != 0;
  }

  int64_t getNumKeys() override {
    CpcrSink sink;
    int64_t result = 0;
    check(table().count(table().context, &result, &sink), sink);
    return result;
  }

  void wait(const std::vector<std::string>& keys) override {
    wait(keys, timeout_);
  }

  void wait(const std::vector<std::string>& keys, const std::chrono::milliseconds& timeout) override {
    CpcrSink sink;
    const auto list = slices(keys);
    check(table().wait(table().context, list.data(), list.size(), timeout.count(), &sink), sink);
  }

 private:
  const CpcrStoreTable& table() const {
    return keys_->table;
  }
  // The member function `check` hides the free one.
  static void check(int code, const CpcrSink& sink) {
    cpcr::check(code, sink);
  }

  std::shared_ptr<Keys> keys_;
};

} // namespace

c10::intrusive_ptr<c10d::Store> make_store(const CpcrStoreTable& table, std::chrono::milliseconds timeout) {
  // The context is owned from here on: nothing above this line may throw.
  auto keys = std::make_shared<Keys>(table);
  return c10::make_intrusive<RustStore>(std::move(keys), timeout);
}

} // namespace cpcr

extern "C" void cpcr_sink_value(CpcrSink* sink, const uint8_t* data, size_t len) {
  cpcr::quietly([&] { sink->value.assign(data, data + len); });
}

extern "C" void cpcr_sink_error(CpcrSink* sink, const char* data, size_t len) {
  cpcr::quietly([&] { sink->error.assign(data, len); });
}

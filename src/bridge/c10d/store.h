// A c10d store whose keys live in Rust: every virtual is one call back.
//
// Not a store itself: no key is kept here. The table of callbacks mirrors `bridge::c10d::store`.
#pragma once
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

extern "C" {

struct CpcrSlice {
  const uint8_t* data;
  size_t len;
};

// Where a callback leaves its answer (`value`) or why there is none (`error`).
struct CpcrSink {
  std::vector<uint8_t> value;
  std::string error;
};

// Each returns a cpcr::Code. `context` is owned by the store, freed once by `release`.
struct CpcrStoreTable {
  void* context;
  int (*set)(void* context, CpcrSlice key, CpcrSlice value, CpcrSink* sink);
  int (*get)(void* context, CpcrSlice key, int64_t timeout_ms, CpcrSink* sink);
  int (*add)(void* context, CpcrSlice key, int64_t delta, int64_t* result, CpcrSink* sink);
  int (*compare_set)(void* context, CpcrSlice key, CpcrSlice expected, CpcrSlice desired, CpcrSink* sink);
  int (*wait)(void* context, const CpcrSlice* keys, size_t count, int64_t timeout_ms, CpcrSink* sink);
  int (*check)(void* context, const CpcrSlice* keys, size_t count, int64_t* result, CpcrSink* sink);
  int (*remove)(void* context, CpcrSlice key, int64_t* result, CpcrSink* sink);
  int (*count)(void* context, int64_t* result, CpcrSink* sink);
  void (*release)(void* context);
};

} // extern "C"

namespace cpcr {

// Takes the table's context over, also when it throws.
c10::intrusive_ptr<c10d::Store> make_store(const CpcrStoreTable& table, std::chrono::milliseconds timeout);

} // namespace cpcr

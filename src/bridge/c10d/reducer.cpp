// c10d's Reducer: buckets gradients and reduces each bucket while backward goes on.
#include <torch/csrc/distributed/c10d/reducer.hpp>

#include "group.h"
#include "guard.h"

// Held by value: its destructor may throw, which a smart pointer would turn into a termination.
struct CpcrReducer {
  c10d::Reducer reducer;
};

extern "C" {

// `buckets` lists the parameters' indices bucket after bucket; `sizes` how many each bucket has.
int cpcr_reducer_new(
    CpcrGroup* group,
    const at::Tensor* const* params,
    size_t param_count,
    const size_t* buckets,
    const size_t* sizes,
    size_t bucket_count,
    int64_t bucket_bytes,
    CpcrReducer** out) {
  return cpcr::guarded([&] {
    std::vector<at::Tensor> tensors;
    tensors.reserve(param_count);
    for (size_t i = 0; i < param_count; ++i) {
      tensors.push_back(*params[i]);
    }
    std::vector<std::vector<size_t>> indices;
    indices.reserve(bucket_count);
    for (size_t b = 0; b < bucket_count; ++b) {
      indices.emplace_back(buckets, buckets + sizes[b]);
      buckets += sizes[b];
    }
    *out = new CpcrReducer{c10d::Reducer(
        std::move(tensors),
        std::move(indices),
        group->group,
        /*expect_sparse_gradients=*/std::vector<bool>(param_count, false),
        bucket_bytes,
        /*find_unused_parameters=*/false,
        /*gradient_as_bucket_view=*/true,
        /*param_names=*/std::unordered_map<size_t, std::string>{},
        /*first_bucket_bytes_cap=*/bucket_bytes,
        /*skip_all_reduce_unused_params=*/false,
        /*use_python_reducer=*/false,
        /*bucket_bytes_cap_list=*/std::vector<int64_t>{})};
  });
}

int cpcr_reducer_prepare(CpcrReducer* reducer, const at::Tensor* const* outputs, size_t count) {
  return cpcr::guarded([&] {
    std::vector<at::Tensor> tensors;
    tensors.reserve(count);
    for (size_t i = 0; i < count; ++i) {
      tensors.push_back(*outputs[i]);
    }
    // The Reducer notes every gradient's arrival for rebuild_buckets, which is never called here:
    // without this the note grows by one entry a parameter and step.
    reducer->reducer.reset_state();
    reducer->reducer.prepare_for_backward(tensors);
  });
}

void cpcr_reducer_free(CpcrReducer* reducer) {
  cpcr::quietly([&] { delete reducer; });
}

int cpcr_clear_gradients(const at::Tensor* const* params, size_t count) {
  return cpcr::guarded([&] {
    for (size_t i = 0; i < count; ++i) {
      params[i]->mutable_grad() = at::Tensor();
    }
  });
}

} // extern "C"

// llama::update_cache.out: the wheel has it only in a plugin of Python's torch.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>

#include <cstring>

namespace {

using executorch::aten::Tensor;

// value [1, T, G, d] goes to cache [1, S, G, d] at positions start .. start+T-1. The output is used by nobody.
Tensor& update_cache_out(executorch::runtime::KernelRuntimeContext& context, const Tensor& value, const Tensor& cache,
                         int64_t start, Tensor& out) {
    const bool fits = value.dim() == 4 && cache.dim() == 4 && value.size(0) == 1 && cache.size(0) == 1 &&
                      value.size(2) == cache.size(2) && value.size(3) == cache.size(3) &&
                      value.scalar_type() == cache.scalar_type() && start >= 0 &&
                      start + value.size(1) <= cache.size(1);
    ET_KERNEL_CHECK(context, fits, InvalidArgument, out);
    const size_t row = static_cast<size_t>(cache.size(2) * cache.size(3)) * static_cast<size_t>(cache.element_size());
    std::memcpy(static_cast<char*>(cache.mutable_data_ptr()) + static_cast<size_t>(start) * row, value.const_data_ptr(),
                static_cast<size_t>(value.size(1)) * row);
    return out;
}

}  // namespace

EXECUTORCH_LIBRARY(llama, "update_cache.out", update_cache_out);

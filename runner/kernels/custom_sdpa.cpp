// llama::custom_sdpa.out as our programs call it: not causal, without a mask, over the first slots of the cache.
#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;

constexpr int64_t BLOCK = 16;  // keys whose scores are computed before the sum so far is scaled

template <typename T>
T rounded(float value) {
    if constexpr (std::is_same_v<T, float>) {
        return value;
    } else {  // by its bits: a cast goes through another type on Arm
        return T(c10::detail::fp16_ieee_from_fp32_value(value), T::from_bits());
    }
}

// One query row q [d] over keys and values [seen, G, d] of its head, in float32: softmax(q k / sqrt(d)) v, with the
// largest score so far taken out as it is found (online softmax, Milakov and Gimelshein 2018).
template <typename T>
void attend(const T* q, const T* k, const T* v, int64_t seen, int64_t stride, int64_t d, float scale, float* sum,
            T* out) {
    float largest = -INFINITY, total = 0;
    std::fill_n(sum, d, 0.0F);
    for (int64_t start = 0; start < seen; start += BLOCK) {
        const int64_t n = std::min(BLOCK, seen - start);
        float scores[BLOCK];
        float block_largest = largest;
        for (int64_t i = 0; i < n; ++i) {
            const T* key = k + (start + i) * stride;
            float product = 0;
            for (int64_t j = 0; j < d; ++j) product += static_cast<float>(q[j]) * static_cast<float>(key[j]);
            scores[i] = product * scale;
            block_largest = std::max(block_largest, scores[i]);
        }
        const float shrunk = std::exp(largest - block_largest);
        largest = block_largest;
        total *= shrunk;
        for (int64_t j = 0; j < d; ++j) sum[j] *= shrunk;
        for (int64_t i = 0; i < n; ++i) {
            const T* value = v + (start + i) * stride;
            const float weight = std::exp(scores[i] - largest);
            total += weight;
            for (int64_t j = 0; j < d; ++j) sum[j] += weight * static_cast<float>(value[j]);
        }
    }
    for (int64_t j = 0; j < d; ++j) out[j] = rounded<T>(sum[j] / total);
}

// All H query heads of T rows [T, H, d]; H / G of them share keys and values [S, G, d].
template <typename T>
void attend_all(const Tensor& q, const Tensor& k, const Tensor& v, int64_t seen, float scale, Tensor& out) {
    const int64_t H = q.size(2), G = k.size(2), d = q.size(3), n = q.size(1) * H;
    executorch::extension::parallel_for(0, n, std::max<int64_t>(1, n / 64), [&](int64_t begin, int64_t end) {
        std::vector<float> sum(static_cast<size_t>(d));
        for (int64_t row = begin; row < end; ++row) {
            const int64_t group = row % H / (H / G);
            attend(q.const_data_ptr<T>() + row * d, k.const_data_ptr<T>() + group * d,
                   v.const_data_ptr<T>() + group * d, seen, G * d, d, scale, sum.data(),
                   out.mutable_data_ptr<T>() + row * d);
        }
    });
}

// start: of the queries; they see positions 0 .. start+T-1 of the cache.
Tensor& custom_sdpa_out(executorch::runtime::KernelRuntimeContext& context, const Tensor& q, const Tensor& k,
                        const Tensor& v, int64_t start, std::optional<Tensor> mask, double dropout, bool is_causal,
                        std::optional<double> scale, Tensor& out) {
    const bool is_plain = !mask.has_value() && dropout == 0 && !is_causal;
    const bool is_kind = q.scalar_type() == ScalarType::Float || q.scalar_type() == ScalarType::Half;
    const bool fits = q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && q.size(0) == 1 && k.size(0) == 1 &&
                      k.size(3) == q.size(3) && k.size(2) > 0 && q.size(2) % k.size(2) == 0 && start >= 0 &&
                      q.size(1) > 0 && start + q.size(1) <= k.size(1) && v.sizes() == k.sizes() &&
                      k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type();
    ET_KERNEL_CHECK_MSG(context, is_plain && is_kind && fits, InvalidArgument, out,
                        "this runner's custom_sdpa is not causal, without mask and dropout, float32 or float16");
    ET_KERNEL_CHECK(context, executorch::runtime::resize_tensor(out, q.sizes()) == executorch::runtime::Error::Ok,
                    InvalidArgument, out);
    const int64_t seen = start + q.size(1);
    const auto by = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3)))));
    if (q.scalar_type() == ScalarType::Float) {
        attend_all<float>(q, k, v, seen, by, out);
    } else {
        attend_all<executorch::aten::Half>(q, k, v, seen, by, out);
    }
    return out;
}

}  // namespace

EXECUTORCH_LIBRARY(llama, "custom_sdpa.out", custom_sdpa_out);

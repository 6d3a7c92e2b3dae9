// sw_norm_forward: launches of NormForward and NormForwardAny (norm_forward.cuh).
#include "norm_forward.cuh"

#include "norms_host.h"

namespace sw {
namespace {

template <typename Kernel, typename T, typename W>
int launch_plan(const SwNormForward& a, const NormPlan& plan) {
  if (plan.blocks > INT32_MAX || plan.threads() > Kernel::kMaxThreads) return kInvalidValue;
  const NormForwardParams<T, W> params{
      {static_cast<const T*>(a.x)},
      {static_cast<const T*>(a.residual)},
      {static_cast<const W*>(a.weight)},
      {static_cast<const W*>(a.bias)},
      {static_cast<T*>(a.y)},
      {static_cast<T*>(a.summed)},
      {static_cast<float*>(a.stats)},
      a.x_stride,
      a.residual_stride,
      a.rows,
      int(a.width),
      plan.lanes,
      a.eps,
      a.weight_offset,
  };
  const Launch at{{unsigned(plan.blocks)}, plan.threads(), int(sizeof(typename Kernel::Shared))};
  return launch<Kernel>(at, params, a.stream);
}

template <typename T, typename W, bool kCentered>
int launch_typed(const SwNormForward& a) {
  constexpr int kItem = sizeof(T), kWide = kVectorBytes / kItem;
  const bool vector = VectorRule()
                          .addresses(a.x, a.residual, a.weight, a.bias, a.y, a.summed)
                          .elements(kItem, a.x_stride, a.residual_stride, a.width)
                          .holds();
  const NormPlan plan = norm_forward_plan(a.rows, int(a.width), kItem, vector);
  if (plan.chunks_per_thread == kAnyChunks)
    return launch_plan<NormForwardAny<T, W, kCentered>, T, W>(a, plan);
  if (plan.chunks_per_thread == kForwardFew)
    return launch_plan<NormForward<T, W, kWide, kForwardFew, kCentered>, T, W>(a, plan);
  return launch_plan<NormForward<T, W, kWide, kForwardMany, kCentered>, T, W>(a, plan);
}

template <typename T>
int launch_weighted(const SwNormForward& a) {
  if (type_at(a.types, 1) == int(Kind::kFloat32))
    return a.centered ? launch_typed<T, float, true>(a) : launch_typed<T, float, false>(a);
  return a.centered ? launch_typed<T, T, true>(a) : launch_typed<T, T, false>(a);
}

}  // namespace
}  // namespace sw

// y, stats and, with residual, summed = x + residual. x and residual (rows, width) of one type with
// row strides in elements; y and summed contiguous; weight and bias (width), both float32 or both
// of x's type; stats (rows): rstd, for layer_norm (centered) followed by (rows): mean.
SW_EXPORT int sw_norm_forward(const SwNormForward* arguments) {
  using namespace sw;
  const SwNormForward& a = *arguments;
  const int type = type_at(a.types, 0), weight_type = type_at(a.types, 1);
  const bool weight_fits = weight_type == type || weight_type == int(Kind::kFloat32);
  if (!row_sizes_fit(a.rows, a.width) || !known_type(type) || !weight_fits) return kInvalidValue;
  if (a.rows == 0) return kSuccess;
  if (Kind(type) == Kind::kFloat32) return launch_weighted<float>(a);
  if (Kind(type) == Kind::kFloat16) return launch_weighted<float16>(a);
  return launch_weighted<bfloat16>(a);
}

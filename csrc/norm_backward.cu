// sw_norm_backward: launches of NormBackward, NormBackwardAny and ColumnSum (norm_backward.cuh).
#include "norm_backward.cuh"

#include "norms_host.h"

namespace sw {
namespace {

Kind weight_kind(const SwNormBackward& a) { return Kind(type_at(a.types, 1)); }

template <typename Kernel, typename T>
int launch_plan(const SwNormBackward& a, const NormPlan& plan, size_t shared_bytes) {
  const NormBackwardParams<T> params{
      {static_cast<const T*>(a.dy)},
      {static_cast<const T*>(a.dsummed)},
      {static_cast<const T*>(a.s)},
      {a.weight, weight_kind(a)},
      {static_cast<const float*>(a.stats)},
      {static_cast<T*>(a.ds)},
      {static_cast<float*>(a.partial)},
      a.dy_stride,
      a.dsummed_stride,
      a.s_stride,
      a.rows,
      int(a.width),
      plan.lanes,
      a.weight_offset,
      a.dbias != nullptr,
  };
  const Launch at{{unsigned(plan.blocks)}, plan.threads(), int(shared_bytes)};
  return launch<Kernel>(at, params, a.stream);
}

template <typename T, int kWide, int kChunks, bool kCentered, bool kAhead>
int launch_held(const SwNormBackward& a, const NormPlan& plan) {
  using Kernel = NormBackward<T, kWide, kChunks, kCentered, kAhead>;
  const bool several = plan.threads() > (plan.lanes < kWarp ? kWarp : plan.lanes);
  const size_t sums = several ? size_t(Kernel::kSums) * kChunks * kWide * plan.lanes : 0;
  const size_t shared = offsetof(typename Kernel::Shared, sums) + sums * sizeof(float);
  return launch_plan<Kernel, T>(a, plan, shared);
}

template <typename T, int kWide, bool kCentered>
int launch_any(const SwNormBackward& a, const NormPlan& plan) {
  using Kernel = NormBackwardAny<T, kWide, kCentered>;
  return launch_plan<Kernel, T>(a, plan, sizeof(typename Kernel::Shared));
}

int launch_column_sum(const SwNormBackward& a, int64_t partials) {
  const int width = int(a.width), columns = a.dbias ? 2 * width : width;
  const ColumnSum::Params params{{static_cast<const float*>(a.partial)},
                                 a.dweight,
                                 a.dbias,
                                 weight_kind(a),
                                 Kind(type_at(a.types, 2)),
                                 int(partials),
                                 columns,
                                 width};
  const unsigned blocks = unsigned(ceil_div(columns, ColumnSum::kColumns));
  return launch<ColumnSum>({{blocks}, ColumnSum::kMaxThreads, sizeof(ColumnSum::Shared)}, params,
                           a.stream);
}

template <typename T, bool kCentered>
int launch_typed(const SwNormBackward& a) {
  constexpr int kItem = sizeof(T), kWide = kVectorBytes / kItem;
  const bool vector = VectorRule()
                          .addresses(a.dy, a.dsummed, a.s, a.weight, a.ds, a.partial)
                          .elements(kItem, a.dy_stride, a.dsummed_stride, a.s_stride, a.width)
                          .holds();
  const NormPlan plan =
      norm_backward_plan(a.rows, int(a.width), kItem, vector, a.multiprocessors);
  int error = kInvalidValue;
  if (plan.chunks_per_thread == kAnyChunks)
    error = vector ? launch_any<T, kWide, kCentered>(a, plan)
                   : launch_any<T, 1, kCentered>(a, plan);
  else if (!vector)
    error = launch_held<T, 1, kBackwardScalars, kCentered, true>(a, plan);
  else if (plan.chunks_per_thread == kBackwardChunks)
    error = launch_held<T, kWide, kBackwardChunks, kCentered, true>(a, plan);
  else if constexpr (kItem == 4)
    error = launch_held<T, kWide, kBackwardManyChunks, kCentered, false>(a, plan);
  if (error || !a.partial) return error;
  return launch_column_sum(a, plan.blocks);
}

template <typename T>
int launch_centered(const SwNormBackward& a) {
  return a.centered ? launch_typed<T, true>(a) : launch_typed<T, false>(a);
}

}  // namespace
}  // namespace sw

// ds and, with partial, dweight and dbias. dy, dsummed and s (rows, width) of one type with row
// strides in elements; ds contiguous; weight (width) of any type; stats as the forward pass left
// them. partial: scratch for `multiprocessors` rows of width, or 2 width with dbias, floats.
SW_EXPORT int sw_norm_backward(const SwNormBackward* arguments) {
  using namespace sw;
  const SwNormBackward& a = *arguments;
  const int type = type_at(a.types, 0);
  const bool known = known_type(type) && known_type(type_at(a.types, 1)) &&
                     known_type(type_at(a.types, 2));
  if (!known || !row_sizes_fit(a.rows, a.width) || a.multiprocessors < 1) return kInvalidValue;
  if ((a.dbias && !a.centered) || (a.partial && !a.dweight)) return kInvalidValue;
  if (a.rows == 0) return kSuccess;
  if (Kind(type) == Kind::kFloat32) return launch_centered<float>(a);
  if (Kind(type) == Kind::kFloat16) return launch_centered<float16>(a);
  return launch_centered<bfloat16>(a);
}

// csrc/norm_plan.h for Python: chunk, chunks_per_thread, lanes, teams, blocks.
#include "norm_plan.h"

#include "abi.h"

namespace {

void copy_out(const sw::NormPlan& plan, int64_t* out) {
  out[0] = plan.chunk;
  out[1] = plan.chunks_per_thread;
  out[2] = plan.lanes;
  out[3] = plan.teams;
  out[4] = plan.blocks;
}

}  // namespace

SW_EXPORT void sw_test_forward_plan(int64_t rows, int width, int item_bytes, int vector,
                                    int64_t* out) {
  copy_out(sw::norm_forward_plan(rows, width, item_bytes, vector != 0), out);
}

SW_EXPORT void sw_test_backward_plan(int64_t rows, int width, int item_bytes, int vector,
                                     int multiprocessors, int64_t* out) {
  copy_out(sw::norm_backward_plan(rows, width, item_bytes, vector != 0, multiprocessors), out);
}

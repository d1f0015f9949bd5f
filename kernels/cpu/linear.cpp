#include "linear.h"

#include "low_rank.h"

// Whether rows of products are to have the same bits however many there are. Many take more time then.
EXPORT void tightrope_set_batch_invariant(int is_wanted) { is_batch_invariant = is_wanted != 0; }

// dtype: 0 float32, 1 bfloat16, 2 float16
EXPORT void tightrope_linear(const float* x, const void* weight, int dtype, const float* bias, float* out, int rows,
                             int inputs, int outputs) {
    linear({x, weight, bias, out, rows, inputs, outputs}, dtype);
}

// Adds to out [count, outputs] what the adapter of each row makes of x [count, inputs].
EXPORT void tightrope_add_low_rank(const float* x, float* out, const low_rank::Adapter* const* adapters,
                                   const low_rank::Rows* rows, int count, int inputs, int outputs) {
    low_rank::add({x, out, *rows, count, inputs, outputs}, adapters);
}

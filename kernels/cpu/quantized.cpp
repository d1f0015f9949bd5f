#include "nf4.h"
#include "quantized_rows.h"
#include "quantized_words.h"

EXPORT void tightrope_quantized_linear(const float* x, const quantized::Matrix* const* matrices, int count,
                                       const float* bias, float* out, int rows) {
    quantized::linear(matrices, count, x, rows, bias, out);
}

// out [count, inputs]
EXPORT void tightrope_quantized_rows(const quantized::Matrix* matrix, const int64_t* numbers, int count, float* out) {
    quantized::expand_outputs(*matrix, numbers, count, out);
}

EXPORT void tightrope_nf4_linear(const float* x, const quantized::Nf4Matrix* const* matrices, int count,
                                 const float* bias, float* out, int rows) {
    quantized::linear(matrices, count, x, rows, bias, out);
}

#include "nf4.h"
#include "quantized_words.h"

EXPORT void tightrope_quantized_linear(const float* x, const quantized::Matrix* const* matrices, int count,
                                       const float* bias, float* out, int rows) {
    quantized::linear(matrices, count, x, rows, bias, out);
}

EXPORT void tightrope_nf4_linear(const float* x, const quantized::Nf4Matrix* const* matrices, int count,
                                 const float* bias, float* out, int rows) {
    quantized::linear(matrices, count, x, rows, bias, out);
}

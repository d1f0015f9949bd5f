// The plain C interface that kernels/cpu/native.py calls. Pointers are to contiguous memory unless a stride, in floats, says
// how far apart tokens are; shapes and meanings are those of kernels/reference.py.

#include "draw.h"
#include "experts.h"
#include "search.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// Raised, here and in kernels/cpu/native.py, whenever what a function takes or reads changes its meaning.
EXPORT int tightrope_interface() { return 4; }

// The widest instruction set that this processor and its system run: 3 AVX-512 with VNNI, 2 AVX-512, 1 AVX2, 0 any.
EXPORT int tightrope_instruction_set() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    return has_avx512 ? __builtin_cpu_supports("avx512vnni") ? 3 : 2 : 1;
#else
    return 0;
#endif
}

EXPORT void tightrope_set_threads(int count) { pool().set_threads(count); }

// dtype: 0 float32, 1 bfloat16, 2 float16
EXPORT void tightrope_linear(const float* x, const void* weight, int dtype, const float* bias, float* out, int rows,
                             int inputs, int outputs) {
    project({weight, bias, dtype, 1, inputs, outputs}, x, out, rows);
}

// Of matrices on the same x; their outputs are side by side.
EXPORT void tightrope_quantized_linear(const float* x, const quantized::Matrix* const* matrices, int count,
                                       const float* bias, float* out, int rows) {
    quantized::linear(matrices, count, x, rows, bias, out);
}

EXPORT void tightrope_nf4_linear(const float* x, const quantized::Nf4Matrix* const* matrices, int count,
                                 const float* bias, float* out, int rows) {
    quantized::linear(matrices, count, x, rows, bias, out);
}

// Adds to out [rows, outputs] what the adapter of each row makes of x.
EXPORT void tightrope_add_low_rank(const float* x, float* out, const int32_t* slots, const float* scales, int rows,
                                   int inputs, int outputs, const low_rank::Adapter* const* adapters, int count) {
    low_rank::add({x, out, slots, scales, rows, inputs, outputs}, adapters, count);
}

// format: 0 f16, 1 q8, 2 q4
EXPORT void tightrope_store_kv(void* key_codes, void* key_scales, void* value_codes, void* value_scales,
                               const float* key_factor, int format, int kv_heads, int dims, const float* keys,
                               int64_t key_stride, const float* values, int64_t value_stride, const int64_t* slots,
                               int tokens) {
    const Cache cache{(uint8_t*)key_codes, (uint8_t*)value_codes, (f16*)key_scales, (f16*)value_scales,
                      key_factor,          format,                kv_heads,         dims};
    store_kv(cache, keys, key_stride, values, value_stride, slots, tokens);
}

EXPORT void tightrope_attention(void* key_codes, void* key_scales, void* value_codes, void* value_scales,
                                const float* key_factor, int format, int kv_heads, int dims, const float* queries,
                                float* out, int heads, const float* pages, const float* places, const int32_t* set_of,
                                int num_pages, int half, const int32_t* query_starts, const int32_t* context_lens,
                                const int32_t* block_tables, int sequences, int block_table_width, float scale,
                                int window, float softcap) {
    const Attention a{queries,
                      out,
                      {(uint8_t*)key_codes, (uint8_t*)value_codes, (f16*)key_scales, (f16*)value_scales, key_factor,
                       format, kv_heads, dims},
                      {pages, places, set_of, num_pages, half},
                      query_starts,
                      context_lens,
                      block_tables,
                      sequences,
                      block_table_width,
                      heads,
                      window,
                      scale,
                      softcap};
    attention(a);
}

EXPORT void tightrope_rotate(const float* x, int64_t stride, float* out, const float* pages, const float* places,
                             const int32_t* set_of, const float* query_scale, int num_pages, int half,
                             const int32_t* positions, const int32_t* sequence_of, int tokens, int heads, int dims) {
    const Rope rope{pages, places, set_of, num_pages, half};
    rotate(x, stride, out, rope, query_scale, positions, sequence_of, tokens, heads, dims);
}

EXPORT void tightrope_rms_norm(const float* x, int64_t stride, const float* weight, float* out, int rows, int width,
                               float eps) {
    rms_norm(x, stride, weight, out, rows, width, eps);
}

// activation: 0 silu, 1 gelu, 2 gelu_tanh
EXPORT void tightrope_gated(const float* gate_up, float* out, int rows, int width, int activation) {
    gated(activation, gate_up, out, rows, width);
}

// out [T, hidden]: what the picked experts of each of x [T, hidden] make of it. adapters: see experts.h.
EXPORT void tightrope_experts(const Experts* layer, const float* x, const int64_t* picked, const float* shares,
                              float* out, int tokens, int each, const low_rank::Adapter* const* adapters,
                              const int32_t* slots, const float* scales, int count) {
    experts(*layer, {picked, shares, tokens, each}, {adapters, slots, scales, count}, x, out);
}

// x [T, hidden] to what the layer makes of it, in place; keys and values are stored. adapters: see layer.h.
EXPORT void tightrope_decoder_layer(const DecoderLayer* layer, float* x, void* key_codes, void* key_scales,
                                    void* value_codes, void* value_scales, const float* key_factor, int format,
                                    int kv_heads, int dims, const float* pages, const float* places,
                                    const int32_t* set_of, int num_pages, int half, const float* query_scale,
                                    const int32_t* query_starts, const int32_t* context_lens,
                                    const int32_t* block_tables, int sequences, int block_table_width,
                                    const int64_t* slots, const int32_t* positions, const int32_t* sequence_of,
                                    int tokens, const low_rank::Adapter* const* adapters,
                                    const int32_t* adapter_slots, const float* adapter_scales, int num_adapters) {
    const Attention a{nullptr,
                      nullptr,
                      {(uint8_t*)key_codes, (uint8_t*)value_codes, (f16*)key_scales, (f16*)value_scales, key_factor,
                       format, kv_heads, dims},
                      {pages, places, set_of, num_pages, half},
                      query_starts,
                      context_lens,
                      block_tables,
                      sequences,
                      block_table_width,
                      layer->heads,
                      layer->window,
                      layer->scale,
                      layer->softcap};
    decoder_layer(*layer, a, {slots, positions, sequence_of, query_scale, tokens},
                  {adapters, adapter_slots, adapter_scales, num_adapters}, x);
}

// A token for each of these rows of logits, -1 where nothing can be drawn. See drawing::Params.
EXPORT void tightrope_draw(const float* logits, int64_t vocab, const int64_t* rows, int64_t count, const double* params,
                           int64_t* token_ids) {
    drawing::draw(logits, vocab, rows, count, params, token_ids);
}

EXPORT void tightrope_rank(const float* logits, int64_t vocab, const int64_t* rows, int64_t count,
                           const int64_t* wanted, int64_t width, float* out_logits, int64_t* out_ids, float* borders,
                           float* tops) {
    drawing::rank_rows(logits, vocab, rows, count, wanted, width, out_logits, out_ids, borders, tops);
}

EXPORT void tightrope_row_sums(const float* logits, int64_t vocab, const int64_t* rows, int64_t count,
                               const double* transforms, int is_mass_alone, double* sums) {
    drawing::sum_rows(logits, vocab, rows, count, transforms, is_mass_alone, sums);
}

// result [3]: see search::Result. masks: see search::Masks.
EXPORT void tightrope_search_file(int file, int64_t start, int64_t bytes, void* buffer, int64_t room,
                                  const uint8_t* masks, int64_t mask_bytes, int width, int64_t all_set,
                                  int64_t* result) {
    const search::Masks m{masks, mask_bytes, width, uint32_t(all_set)};
    const search::Result r = search::in_file(m, file, start, bytes, (uint8_t*)buffer, room);
    result[0] = r.read, result[1] = r.found, result[2] = r.error;
}

// The library as a whole: what it tells of itself, and whole layers, which the other units compute.

#include "experts.h"

// Raised, here and in kernels/cpu/native.py, whenever what a function takes or reads changes its meaning.
EXPORT int tightrope_interface() { return 10; }

// Bytes of the struct of this name; -1 if there is none.
EXPORT int64_t tightrope_sizeof(const char* name) {
#define SIZE_OF(known, type) \
    if (!strcmp(name, #known)) return sizeof(type);
    STRUCTS(SIZE_OF)
#undef SIZE_OF
    return -1;
}

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

EXPORT void tightrope_rotate(const float* x, int64_t stride, float* out, const Rope* rope, const Step* step, int tokens,
                             int heads, int dims) {
    rotate(x, stride, out, *rope, *step, tokens, heads, dims);
}

EXPORT void tightrope_rms_norm(const float* x, int64_t stride, const float* weight, float* out, int rows, int width,
                               float eps) {
    rms_norm(x, stride, weight, out, rows, width, eps);
}

// activation: 0 silu, 1 gelu, 2 gelu_tanh
EXPORT void tightrope_gated(const float* gate_up, float* out, int rows, int width, int activation) {
    gated(activation, gate_up, out, rows, width);
}

// local [rows, sizes[rank]] to out [rows, sum of sizes]; sizes are bytes by rank. All ranks must call it alike.
EXPORT void tightrope_gather(Ranks* ranks, const void* local, const int32_t* sizes, int rows, void* out) {
    meet::gather(*ranks, (const uint8_t*)local, sizes, rows, (uint8_t*)out);
}

static Adapted adapted(const low_rank::Adapter* const* adapters, const low_rank::Rows* rows) {
    return {adapters, rows ? *rows : low_rank::Rows{}};
}

// out [T, hidden]: what the picked experts of each of x [T, hidden] make of it; see experts.h for `between`. Adapters and
// rows may be null, and one of x, `between` and out.
EXPORT void tightrope_experts(const Experts* layer, const float* x, const int64_t* picked, const float* shares,
                              float* between, float* out, int tokens, int each,
                              const low_rank::Adapter* const* adapters, const low_rank::Rows* rows) {
    experts(*layer, {picked, shares, tokens, each}, adapted(adapters, rows), x, between, out);
}

// x [T, hidden] to what `count` layers make of it, one after the other, in place; keys and values are stored. Ropes are null
// without rotation; adapters and rows may be.
EXPORT void tightrope_decoder_layers(const DecoderLayer* const* layers, int count, float* x, int tokens,
                                     const Cache* const* caches, const Rope* const* ropes, const Step* const* steps,
                                     const low_rank::Adapter* const* adapters, const low_rank::Rows* rows) {
    for (int i = 0; i < count; ++i) {
        decoder_layer(*layers[i], *caches[i], ropes[i] ? *ropes[i] : Rope{}, *steps[i], adapted(adapters, rows), x, tokens);
        if (adapters) adapters += size_t(ADAPTED) * rows->count;
    }
}

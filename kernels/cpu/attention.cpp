#include "step.h"

EXPORT void tightrope_store_kv(const Cache* cache, const float* keys, int64_t key_stride, const float* values,
                               int64_t value_stride, const int64_t* slots, int tokens) {
    store_kv(*cache, keys, key_stride, values, value_stride, slots, tokens);
}

EXPORT void tightrope_copy_slots(const Cache* cache, const int64_t* sources, const int64_t* targets, int count) {
    copy_slots(*cache, sources, targets, count);
}

// Without rotation `rope` is null.
EXPORT void tightrope_attention(const float* queries, float* out, int heads, const Cache* cache, const Rope* rope,
                                const Step* step, float scale, int window, float softcap) {
    attention({queries, out, heads, window, scale, softcap, *cache, rope ? *rope : Rope{}, *step});
}

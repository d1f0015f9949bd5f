// Tensors as ggml lays them out, and the nodes of its graphs that are computed here instead.
//
// ggml.h is public, but its layout belongs to a version: recognize() compares all that is used of it with tensors that
// the library itself has made, and nothing is touched where one field is elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace ggml {

enum Type { TYPE_F32 = 0, TYPE_F16 = 1, TYPE_Q4_0 = 2, TYPE_Q8_0 = 8, TYPE_BF16 = 30 };  // As in files, so they stay.

constexpr int ALL_THREADS = -1;

struct Tensor {
    int32_t type;
    void* buffer;
    int64_t ne[4];  // Numbers in each dimension, the innermost first;
    size_t nb[4];   // bytes from one to the next.
    int32_t op;
    int32_t op_params[16];
    int32_t flags;
    Tensor* src[10];
    Tensor* view_src;
    size_t view_offs;
    uint8_t* data;
    char name[64];
    void* extra;
    char padding[8];

    const uint8_t* at(int64_t second, int64_t third) const { return data + second * nb[1] + third * nb[2]; }
};

typedef void (*Work)(Tensor* node, int thread, int threads, void* what);

// The parameters of a node that a function of ours computes.
struct Custom {
    Work work;
    int32_t threads;
    void* what;
};

struct AttentionParams { float scale, max_bias, softcap; };
enum Source { QUERIES, KEYS, VALUES, MASK, SINKS };

template <class T> T params_of(const Tensor& node) {
    static_assert(sizeof(T) <= sizeof node.op_params);
    T params;
    memcpy(&params, node.op_params, sizeof params);
    return params;
}

// The numbers of two operations, which change with versions.
struct Operations { int32_t attention = -1, custom = -1; };

// Have `node` computed by work(node, thread, threads, what), with what it has as sources and where its output lies.
inline void replace(Tensor& node, const Operations& known, Work work, void* what) {
    Custom custom;
    memset(&custom, 0, sizeof custom);
    custom.work = work, custom.threads = ALL_THREADS, custom.what = what;
    memset(node.op_params, 0, sizeof node.op_params);
    memcpy(node.op_params, &custom, sizeof custom);
    node.op = known.custom;
}

// What a library was asked to make: attention of queries [5, 6, 64] over 32 keys [32, 3, 64] and values [32, 3, 96] with a
// scale of 0.5, a bias of 0.25 and a softcap of 0.125; and a node [2, 3, 4, 5] of the same sources, for `work` and `what`.
struct Samples {
    const Tensor* sources[4];  // As Source numbers them.
    const void* data[4];
    const Tensor *attention, *custom;
    Work work;
    void* what;
};

// Whether both are laid out as here; then their operations are `found`.
inline bool recognize(const Samples& samples, Operations& found) {
    const auto is_shaped = [](const Tensor& t, int type, int64_t a, int64_t b, int64_t c, int64_t d) {
        const size_t bytes = type == TYPE_F32 ? 4 : 2;
        return t.type == type && t.ne[0] == a && t.ne[1] == b && t.ne[2] == c && t.ne[3] == d && t.nb[0] == bytes &&
               t.nb[1] == bytes * a && t.nb[2] == bytes * a * b && t.nb[3] == bytes * a * b * c;
    };
    const Tensor &attention = *samples.attention, &custom = *samples.custom;
    bool is_known = is_shaped(*samples.sources[QUERIES], TYPE_F32, 64, 5, 6, 1) &&
                    is_shaped(*samples.sources[KEYS], TYPE_F16, 64, 32, 3, 1) &&
                    is_shaped(*samples.sources[VALUES], TYPE_F16, 96, 32, 3, 1) &&
                    is_shaped(*samples.sources[MASK], TYPE_F16, 32, 5, 1, 1) &&
                    is_shaped(attention, TYPE_F32, 96, 6, 5, 1) && is_shaped(custom, TYPE_F32, 2, 3, 4, 5);
    for (int i = 0; i < 4; ++i)
        is_known = is_known && attention.src[i] == samples.sources[i] && custom.src[i] == samples.sources[i] &&
                   samples.sources[i]->data == samples.data[i];
    if (!is_known || attention.src[SINKS] || custom.src[4] || attention.op == custom.op) return false;
    const AttentionParams given = params_of<AttentionParams>(attention);
    const Custom ours = params_of<Custom>(custom);
    found = {attention.op, custom.op};
    return given.scale == 0.5f && given.max_bias == 0.25f && given.softcap == 0.125f && ours.work == samples.work &&
           ours.threads == ALL_THREADS && ours.what == samples.what;
}

}  // namespace ggml

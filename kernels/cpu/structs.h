// What Python hands over by address. Every struct here has a twin of the same fields in structs.py; STRUCTS lists them by
// the twin's name, so that native.py compares the sizes of all when it loads a library.
#pragma once

#include "ggml.h"
#include "simd.h"

constexpr int PAGE = 16;   // tokens in a page of the cache
constexpr int GROUP = 32;  // values of a token that share a scale

enum Format { F16, Q8, Q4 };

struct Cache {
    uint8_t *key_codes, *value_codes;
    f16 *key_scales, *value_scales;
    const float* key_factor;  // [Hkv, D]
    int32_t format, kv_heads, dims;

    int groups() const { return (dims + GROUP - 1) / GROUP; }
    int padded() const { return groups() * GROUP; }
    int code_bytes() const { return format == F16 ? 2 * dims : format == Q8 ? padded() : padded() / 2; }
    // A head's first token in a page, as its number among all of the cache.
    size_t token(int page, int head) const { return (size_t(page) * kv_heads + head) * PAGE; }
};

// Without rotation all is null and 0.
struct Rope {
    const float *pages, *places, *query_scale;  // [S, num_pages, 2, half], [S, PAGE, 2, half], [S]
    const int32_t* set_of;                      // [B]
    int32_t num_pages, half;
};

// The sequences of a step of T tokens: StepLayout in kernels/forms/layout.py.
struct Step {
    const int32_t *query_starts, *context_lens, *block_tables;  // [B + 1], [B], [B, block_table_width]
    const int32_t *positions, *sequence_of;                     // [T]
    const int64_t* slots;                                       // [T]
    int32_t sequences, block_table_width;
};

namespace low_rank {

// An addition to `outputs` outputs from `first` on.
struct Part {
    const void *down, *up;  // [rank, inputs], [rank, outputs], both of `dtype`
    int32_t dtype, first, rank, outputs;
};

struct Adapter {
    const Part* parts;
    int32_t count;
};

// Which adapter each of T rows uses, by its slot, and how much of it; and the slots of the `count` that are in use.
struct Rows {
    const int32_t *slots, *present;  // [T], [count]
    const float* scales;             // [T]
    int32_t count;
};

}  // namespace low_rank

namespace quantized {

// QuantizedMatrix in kernels/forms/quantized.py.
struct Matrix {
    const uint8_t* codes;
    const void* scales;      // numbers, or their codes where there is a `group_max`
    const float* group_max;  // null, or [groups]
    const int16_t* zeros;    // null, or like the scales
    const f16* mins;         // null, or like the scales
    const int8_t* scale_codes;  // null, or, where 2^unit_shift groups share scales and mins, what they are times
    const int8_t* codebook;  // null, or [16]
    const int32_t* source;   // null, or the input that each stored row multiplies
    const int32_t* group_starts;
    const uint8_t* group_bits;
    int64_t tile_bytes;
    int32_t inputs, outputs, groups, scale_kind, unit_shift, are_six_bits;
    int32_t group_rows;  // 0 where groups have different numbers of rows, or of bits.

    int rows() const { return group_starts[groups]; }
    // Of the codes, and of the scales and mins, of a tile's group: its place in tensors of each.
    size_t place(size_t tile, int g) const { return (tile * groups + g) * 16; }
    size_t unit_place(size_t tile, int g) const { return (tile * (groups >> unit_shift) + (g >> unit_shift)) * 16; }
    bool holds_both() const { return scale_codes && mins && !are_six_bits; }  // Codes of scales and mins, of four bits each.
    // Whether another matrix takes the same x in the same order.
    bool reads_as(const Matrix& other) const { return source == other.source && group_starts == other.group_starts; }
};

// Nf4Matrix in kernels/forms/quantized.py.
struct Nf4Matrix {
    const float* codebook;
    const int32_t* codes;
    const float* scales;
    int32_t inputs, outputs, blocksize;
};

}  // namespace quantized

// Of plain weights the kinds are those of every `dtype` here.
enum Kind { PLAIN_FLOAT32, PLAIN_BFLOAT16, PLAIN_FLOAT16, QUANTIZED, NF4 };

struct Projection {
    const void* weight;  // [outputs, inputs], or the addresses of `count` quantized matrices
    const float* bias;   // null, or [outputs]
    int32_t kind, count, inputs, outputs;
};

struct Norm {
    const float* weight;  // null without a norm
    float eps;
};

// This process among the `count` of one machine that have a part of a model each: SharedRanks in kernels/forms/ranks.py.
struct Ranks {
    uint8_t* memory;  // It is shared by all: an arrival of each rank, and two buffers.
    int64_t buffer_bytes;
    int32_t rank, count, spins;
    uint32_t turn;  // So many meetings this rank has come to.
};

// How a layer's columns are split over ranks: the bytes that each rank has of a row [count]; null where each has all.
struct Split {
    Ranks* ranks;
    const int32_t *attended, *out, *middle, *down;
};

struct DecoderLayer {
    const Split* split;  // Null where one rank has all of the layer.
    Projection qkv, out, gate_up, down;
    Norm before_attention, after_attention, before_mlp, after_mlp, of_queries, of_keys;
    int32_t heads, window, activation;
    float scale, softcap;
};

struct Experts {
    const Projection *gate_up, *down;  // [count]
    int32_t count, activation;
};

namespace search {

// Masks of `bytes` bytes, a multiple of STEP, one after another as often as the file goes on. Each is of a word of the
// file, `width` bytes wide: `all_set`, or 0 where the word may be anything.
struct Masks {
    const uint8_t* masks;
    int64_t bytes;
    int32_t width;
    uint32_t all_set;
};

// Bytes until the file ended or a word was found; its place or -1; errno or 0.
struct Result {
    int64_t read, found, error;
};

}  // namespace search

#define STRUCTS(each)                                                                                            \
    each(Cache, Cache) each(Rope, Rope) each(Step, Step) each(Projection, Projection) each(Norm, Norm)           \
    each(Ranks, Ranks) each(Split, Split)                                                                        \
    each(DecoderLayer, DecoderLayer) each(Experts, Experts) each(LowRankPart, low_rank::Part)                    \
    each(LowRankAdapter, low_rank::Adapter) each(LowRankRows, low_rank::Rows) each(Matrix, quantized::Matrix)    \
    each(Nf4Matrix, quantized::Nf4Matrix) each(Masks, search::Masks) each(SearchResult, search::Result)          \
    each(Samples, ggml::Samples)

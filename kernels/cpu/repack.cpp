#include "repack.h"
#include "units.h"

EXPORT int tightrope_pack_columns(const uint32_t* words, int64_t stride, const int64_t* starts, int outputs,
                                  const int32_t* run_starts, const int32_t* run_bits, int runs, uint8_t* out) {
    return repack::pack(repack::Columns{words, stride, starts, outputs}, {run_starts, run_bits, runs}, out);
}

EXPORT void tightrope_pack_nibbles(const uint32_t* words, int64_t stride, const int32_t* source,
                                   const int32_t* nibble_of, int stored, int outputs, uint8_t* out) {
    repack::pack_nibbles(words, stride, source, nibble_of, stored, outputs, out);
}

// out: int16 [C, G, 16] where is_wide, uint8 else
EXPORT void tightrope_unpack_rows(const uint32_t* words, int64_t stride, const int32_t* starts, int bits, int more,
                                  int groups, int outputs, void* out, int is_wide) {
    if (is_wide) repack::unpack_rows(words, stride, starts, bits, more, groups, outputs, (int16_t*)out);
    else repack::unpack_rows(words, stride, starts, bits, more, groups, outputs, (uint8_t*)out);
}

EXPORT void tightrope_pack_nf4(const uint8_t* bytes, const float* block_scales, int64_t blocksize, int64_t run,
                               int inputs, int outputs, uint32_t* codes, float* scales) {
    repack::nf4(bytes, block_scales, blocksize, run, inputs, outputs, codes, scales);
}

// Whether all numbers are finite. kind: 0 float32, 1 bfloat16, 2 float16
EXPORT int tightrope_copy_finite(const void* from, int64_t count, int kind, void* to) {
    if (kind == 0) return repack::copy_finite((const uint32_t*)from, count, uint32_t(0x7f800000), (uint32_t*)to);
    return repack::copy_finite((const uint16_t*)from, count, uint16_t(kind == 1 ? 0x7f80 : 0x7c00), (uint16_t*)to);
}

#include "gguf_blocks.h"
#include "units.h"

// See gguf::pack. Pointers to what a type doesn't have are null. Returns whether the type is known.
EXPORT int tightrope_pack_blocks(int type, const uint8_t* raw, int outputs, int inputs, uint8_t* codes, uint8_t* scales,
                                 uint8_t* scale_codes, uint8_t* mins) {
    return gguf::pack(type, raw, outputs, inputs, {codes, scales, scale_codes, mins});
}

// Words of a file whose bits of a mask are all set, as those of an exponent are where a float isn't finite.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "structs.h"

namespace search {

constexpr int STEP = 256;  // Bytes that are looked at together.

// Whether there is such a word in data, which starts where the masks do; bytes is a multiple of STEP.
template <class Word> bool is_in(const Masks& m, const uint8_t* data, int64_t bytes) {
    typedef Word Vector __attribute__((vector_size(4 * LANES)));
    constexpr int VECTORS = STEP / sizeof(Vector);
    const Vector all_set = Vector{} + Word(m.all_set);
    Vector hits[VECTORS] = {};
    for (int64_t begin = 0; begin < bytes; begin += m.bytes) {
        const int64_t count = std::min(m.bytes, bytes - begin);
        for (int64_t i = 0; i < count; i += STEP)
#pragma GCC unroll 16
            for (int k = 0; k < VECTORS; ++k) {
                const int64_t at = i + k * int64_t(sizeof(Vector));
                hits[k] |= (Vector)((load_as<Vector>(data + begin + at) & load_as<Vector>(m.masks + at)) == all_set);
            }
    }
    Word hit = 0;
    for (const Vector& v : hits)
        for (int i = 0; i < int(sizeof(Vector) / sizeof(Word)); ++i) hit |= v[i];
    return hit;
}

// Where the first such word starts; bytes where there is none.
template <class Word> int64_t place_in(const Masks& m, const uint8_t* data, int64_t bytes) {
    for (int64_t i = 0; i + int64_t(sizeof(Word)) <= bytes; i += sizeof(Word))
        if ((load_as<Word>(data + i) & load_as<Word>(m.masks + i % m.bytes)) == Word(m.all_set)) return i;
    return bytes;
}

template <class Word> int64_t first_in(const Masks& m, uint8_t* data, int64_t bytes) {
    const int64_t whole = (bytes + STEP - 1) / STEP * STEP;
    memset(data + bytes, 0, whole - bytes);
    return is_in<Word>(m, data, whole) ? place_in<Word>(m, data, bytes) : bytes;
}

inline int64_t first(const Masks& m, uint8_t* data, int64_t bytes) {
    return m.width == 1   ? first_in<uint8_t>(m, data, bytes)
           : m.width == 2 ? first_in<uint16_t>(m, data, bytes)
                          : first_in<uint32_t>(m, data, bytes);
}

// From byte `start` of a file on; `room` bytes of `buffer` are used again and again, so that they stay in the cache.
inline Result in_file(const Masks& m, int file, int64_t start, int64_t bytes, uint8_t* buffer, int64_t room) {
    const int64_t piece = room / m.bytes * m.bytes;
    for (int64_t done = 0; done < bytes;) {
        const int64_t wanted = std::min(piece, bytes - done);
        int64_t got = 0;
        while (got < wanted) {
            const ssize_t more = pread(file, buffer + got, wanted - got, start + done + got);
            if (more < 0 && errno == EINTR) continue;
            if (more < 0) return {done + got, -1, errno};
            if (!more) return {done + got, -1, 0};
            got += more;
        }
        const int64_t place = first(m, buffer, got);
        done += place;
        if (place < got) return {done, done, 0};
    }
    return {bytes, -1, 0};
}

}  // namespace search

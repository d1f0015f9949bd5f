// Large matrices in large pages of memory, where the system has them.
#pragma once

#include <sys/mman.h>

#include <cstdint>

// Memory of that size is wanted in large pages: it is written, and read at each step, from end to end.
inline void large_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t LARGE = 2 << 20;
    const uintptr_t begin = ((uintptr_t)memory + LARGE - 1) / LARGE * LARGE, end = ((uintptr_t)memory + bytes) / LARGE * LARGE;
    if (begin < end) madvise((void*)begin, end - begin, MADV_HUGEPAGE);  // Where it can't be, pages are small.
#endif
}

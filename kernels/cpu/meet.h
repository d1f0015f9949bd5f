// Ranks of one machine, processes with a part of a model each, hand their columns to each other through shared memory.
#pragma once

#include <algorithm>
#include <atomic>
#include <climits>
#include <ctime>
#include <thread>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "structs.h"

namespace meet {

// How many times a rank has come to a meeting, and how many others sleep until it comes again. It lies in shared memory,
// apart from the next one's, which another processor writes. What follows there is of kernels/cpu/left_steps.py.
struct alignas(128) Arrival {
    std::atomic<uint32_t> turn, sleepers;
};
static_assert(sizeof(Arrival) == 128 && std::atomic<uint32_t>::is_always_lock_free, "kernels/forms/ranks.py has this size");

constexpr int YIELDS = 5000;  // They take some milliseconds where nobody else wants to run.
constexpr int SECONDS = 1;  // A sleep, after which it is looked again; a wake can't be lost, and this costs nothing.

INLINE void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

INLINE void sleep_while(std::atomic<uint32_t>& turn, uint32_t seen) {
#ifdef __linux__
    const timespec limit{SECONDS, 0};
    syscall(SYS_futex, (uint32_t*)&turn, FUTEX_WAIT, seen, &limit, nullptr, 0);
#else
    std::this_thread::yield();
#endif
}

INLINE void wake_all(std::atomic<uint32_t>& turn) {
#ifdef __linux__
    syscall(SYS_futex, (uint32_t*)&turn, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
#endif
}

// Waits until another has come to meeting `turn`, awake at first, then letting others run: a virtual processor that rests
// takes as long to wake as several operations. Counted turns wrap around, so that their difference tells.
INLINE void wait_for(Arrival& other, uint32_t turn, int spins) {
    const auto is_there = [&](uint32_t seen) { return int32_t(seen - turn) >= 0; };
    for (int spin = 0; spin < spins; ++spin) {
        if (is_there(other.turn.load(std::memory_order_acquire))) return;
        pause();
    }
    for (int yield = 0; yield < YIELDS; ++yield) {
        if (is_there(other.turn.load(std::memory_order_acquire))) return;
        std::this_thread::yield();
    }
    other.sleepers.fetch_add(1);  // Either the other sees this, or we see its turn: both sides write, then read.
    for (uint32_t seen; !is_there(seen = other.turn.load());) sleep_while(other.turn, seen);
    other.sleepers.fetch_sub(1);
}

// Returns when all ranks have come as often as this one has now.
INLINE void meet(Ranks& ranks) {
    Arrival* const arrivals = (Arrival*)ranks.memory;
    const uint32_t turn = ++ranks.turn;
    Arrival& mine = arrivals[ranks.rank];
    mine.turn.store(turn);
    if (mine.sleepers.load()) wake_all(mine.turn);
    for (int rank = 0; rank < ranks.count; ++rank)
        if (rank != ranks.rank) wait_for(arrivals[rank], turn, ranks.spins);
}

// Bytes of a row of all ranks' columns, of which a rank has sizes[rank] bytes; where its own begin.
struct Columns {
    size_t whole = 0, first = 0, own = 0;
    Columns(const Ranks& ranks, const int32_t* sizes) {
        for (int rank = 0; rank < ranks.count; ++rank) {
            if (rank == ranks.rank) first = whole, own = sizes[rank];
            whole += sizes[rank];
        }
    }
};

// local [rows, own] to out [rows, whole], in bytes; no row has more of them than a buffer. There are two buffers, in turn:
// who writes into one for the next meeting but one has met all the others since, who have read it by then.
static void gather(Ranks& ranks, const uint8_t* local, const int32_t* sizes, int rows, uint8_t* out) {
    const Columns columns(ranks, sizes);
    const size_t whole = columns.whole, own = columns.own;
    const int most = int(std::min<size_t>(rows, ranks.buffer_bytes / whole));
    for (int begin = 0; begin < rows; begin += most) {
        const int count = std::min(most, rows - begin);
        uint8_t* const buffer = ranks.memory + sizeof(Arrival) * ranks.count + (ranks.turn & 1) * size_t(ranks.buffer_bytes);
        for (int row = 0; row < count; ++row)
            memcpy(buffer + row * whole + columns.first, local + (begin + row) * own, own);
        meet(ranks);
        memcpy(out + begin * whole, buffer, count * whole);
    }
}

}  // namespace meet

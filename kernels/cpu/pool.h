// The threads that compute: our own few, because two pools that wait by spinning (ours and a BLAS's) starve each other.
#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#include "simd.h"

// Tasks 0 .. count are taken one by one by the caller and by whichever workers are awake: a worker that sleeps through a
// job costs nothing. Workers wait for the next job awake for some tens of microseconds, the time that a caller needs
// between two operations, then sleep.
class Pool {
  public:
    // The caller counts as one.
    void set_threads(int count) {
        std::lock_guard<std::mutex> alone(running_);
        stop();
        threads_ = count < 1 ? 1 : count;
    }
    int threads() const { return threads_; }

    template <class F> void run(int count, F&& work) {
        if (count <= 0) return;
        // of two callers at the same time the second works by itself
        std::unique_lock<std::mutex> alone(running_, std::try_to_lock);
        if (count == 1 || threads_ == 1 || !alone.owns_lock()) {
            for (int task = 0; task < count; ++task) work(task);
            return;
        }
        if (workers_.empty()) start();
        typedef typename std::remove_reference<F>::type Plain;
        Job job{[](void* what, int task) { (*(Plain*)what)(task); }, (void*)&work, count, {0}};
        job_.store(&job);
        announce();
        take(&job);
        job_.store(nullptr);
        while (inside_.load()) pause();  // Those who joined finish their last task.
    }

    // After a fork the child has none of the threads, and perhaps locks that nobody will open: begin anew.
    void forget() { new (this) Pool(threads_); }

    explicit Pool(int threads) : threads_(threads) {}

  private:
    struct Job {
        void (*work)(void* what, int task);
        void* what;
        int count;
        std::atomic<int> next;
    };

    static void pause() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#else
        std::this_thread::yield();
#endif
    }
    static void take(Job* job) {
        for (int task; (task = job->next.fetch_add(1, std::memory_order_relaxed)) < job->count;)
            job->work(job->what, task);
    }

    void start() {
        stopping_.store(false);
        const unsigned epoch = epoch_.load();
        for (int i = 1; i < threads_; ++i) workers_.emplace_back([this, epoch] { serve(epoch); });
    }
    void stop() {
        stopping_.store(true);
        announce();
        for (std::thread& worker : workers_) worker.join();
        workers_.clear();
    }

    // Either a worker sees the new epoch before it sleeps, or we see that it sleeps: both sides write, then read.
    void announce() {
        epoch_.fetch_add(1);
        if (!sleepers_.load()) return;
        std::lock_guard<std::mutex> guard(sleep_);
        wake_.notify_all();
    }
    void wait(unsigned seen) {
        for (int spin = 0; spin < SPINS; ++spin) {
            if (epoch_.load(std::memory_order_relaxed) != seen) return;
            pause();
        }
        std::unique_lock<std::mutex> guard(sleep_);
        sleepers_.fetch_add(1);
        wake_.wait(guard, [&] { return epoch_.load() != seen; });
        sleepers_.fetch_sub(1);
    }
    void serve(unsigned seen) {
        for (;;) {
            wait(seen);
            seen = epoch_.load();
            if (stopping_.load()) return;
            inside_.fetch_add(1);  // This comes before the job is read: the caller leaves only when nobody is inside
            if (Job* job = job_.load()) take(job);
            inside_.fetch_sub(1);
        }
    }

    static constexpr int SPINS = 2000;  // They take some 40 microseconds.

    std::mutex running_, sleep_;
    std::condition_variable wake_;
    std::atomic<Job*> job_{nullptr};
    std::atomic<unsigned> epoch_{0};
    std::atomic<int> inside_{0}, sleepers_{0};
    std::atomic<bool> stopping_{false};
    std::vector<std::thread> workers_;
    int threads_ = 1;
};

// Never destroyed: its threads may outlive the library's other objects.
inline Pool& pool() {
    static Pool* const one = [] {
        pthread_atfork(nullptr, nullptr, [] { pool().forget(); });
        return new Pool(1);
    }();
    return *one;
}

// Floats of one thread, kept between calls and grown when needed; what they held is lost.
class Scratch {
  public:
    float* floats(size_t count) {
        if (count > count_) {
            free(memory_);
            count_ = (count + 1023) / 1024 * 1024;
            memory_ = (float*)aligned_alloc(64, 4 * count_);
            if (!memory_) abort();
        }
        return memory_;
    }
    ~Scratch() { free(memory_); }

  private:
    float* memory_ = nullptr;
    size_t count_ = 0;
};

#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "secateur/kernels.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace secateur {
namespace {

enum : int { kIdle = 0, kCalled = 1, kRunning = 2 };
constexpr unsigned kSpinsBeforeSleep = 4000;  // some tens of microseconds, the gap between two layers of a model

struct alignas(64) Worker {
  std::atomic<int> state{kIdle};
  std::atomic<bool> asleep{false};
  std::mutex mutex;
  std::condition_variable wake;
};

class Pool {
 public:
  bool try_run(int threads, void (*task)(void*), void* context) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy) return false;
    while (static_cast<int>(workers_.size()) < threads - 1 && grow()) {
    }
    task_ = task;
    context_ = context;
    const int helpers = std::min(threads - 1, static_cast<int>(workers_.size()));
    for (int i = 0; i < helpers; i++) {
      Worker& w = *workers_[i];
      w.state.store(kCalled);
      if (w.asleep.load()) {
        std::lock_guard<std::mutex> lock(w.mutex);
        w.wake.notify_one();
      }
    }
    task(context);
    for (int i = 0; i < helpers; i++) {
      // A worker that has not started yet is no longer needed.
      int called = kCalled;
      if (workers_[i]->state.compare_exchange_strong(called, kIdle)) continue;
      for (unsigned spins = 0; workers_[i]->state.load(std::memory_order_acquire) != kIdle;) relax(spins);
    }
    return true;
  }

 private:
  bool grow() {
    try {
      auto worker = std::make_unique<Worker>();
      std::thread(&Pool::loop, this, worker.get()).detach();
      workers_.push_back(std::move(worker));
      return true;
    } catch (const std::exception&) {
      return false;  // the machine gives no more threads; the task runs on those that there are
    }
  }

  void loop(Worker* w) {
    for (;;) {
      unsigned spins = 0;
      while (w->state.load(std::memory_order_relaxed) != kCalled) {
        if (spins < kSpinsBeforeSleep) {
          relax(spins);
          continue;
        }
        std::unique_lock<std::mutex> lock(w->mutex);
        w->asleep.store(true);
        w->wake.wait(lock, [&] { return w->state.load() == kCalled; });
        w->asleep.store(false);
      }
      int called = kCalled;
      if (!w->state.compare_exchange_strong(called, kRunning)) continue;
      task_(context_);
      w->state.store(kIdle, std::memory_order_release);
    }
  }

  std::mutex busy_;
  std::vector<std::unique_ptr<Worker>> workers_;
  void (*task_)(void*) = nullptr;
  void* context_ = nullptr;
};

// The pool is never destroyed: detached workers may outlive every static object. A forked child has none of its
// parent's threads, so it drops the pool, and the OpenMP runtime, which does not survive a fork either.
std::atomic<Pool*> g_pool{nullptr};
std::atomic<sct_fork_function> g_openmp{nullptr};

void after_fork_in_child() {
  g_pool.store(nullptr);
  g_openmp.store(nullptr);
}

Pool* pool() {
  Pool* p = g_pool.load(std::memory_order_acquire);
  if (p) return p;
  static const int registered = pthread_atfork(nullptr, nullptr, after_fork_in_child);
  (void)registered;
  Pool* fresh = new (std::nothrow) Pool;
  if (!fresh) return nullptr;
  if (g_pool.compare_exchange_strong(p, fresh)) return fresh;
  delete fresh;
  return p;
}

}  // namespace

void relax(unsigned& spins) {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
  if (++spins % 512 == 0) sched_yield();
}

void run_parallel(int threads, void (*task)(void*), void* context, const CallerThreads& on) {
  if (threads > 1) {
    if (on.run) {
      on.run(on.pool, task, context, threads);
      return;
    }
    if (sct_fork_function openmp = g_openmp.load(std::memory_order_acquire)) {
      openmp(task, context, static_cast<unsigned>(threads), 0);
      return;
    }
    Pool* p = pool();
    if (p && p->try_run(threads, task, context)) return;
  }
  task(context);
}

}  // namespace secateur

extern "C" void sct_use_openmp(sct_fork_function gomp_parallel) {
  secateur::pool();  // registers the fork handler
  secateur::g_openmp.store(gomp_parallel);
}

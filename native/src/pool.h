// Runs one task on several threads. The task takes its work from counters in the context, so any number of threads,
// even one, finishes it.
#pragma once

#include "secateur/kernels.h"

namespace secateur {

// Threads of the caller of the C interface. Where `run` is null, the threads are OpenMP's (sct_use_openmp) or those of
// our own pool.
struct CallerThreads {
  sct_run_function run = nullptr;
  void* pool = nullptr;
};

// Calls task(context) on the calling thread and on up to threads - 1 other threads; returns when all calls have
// returned. Re-entrant: a caller that finds the pool busy runs its task on its own thread only.
void run_parallel(int threads, void (*task)(void*), void* context, const CallerThreads& on = {});

// Tells the CPU that this thread waits in a loop; yields to other threads from time to time.
void relax(unsigned& spins);

}  // namespace secateur

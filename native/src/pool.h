// Runs one task on several threads. The task takes its work from counters that the caller put into the
// context, so that any number of threads, even one, finishes it.
#pragma once

#include "secateur/kernels.h"

namespace secateur {

// Threads that somebody else keeps; without `run`, OpenMP's or our own.
struct Threads {
  sct_run_function run = nullptr;
  void* pool = nullptr;
};

// Calls task(context) on the calling thread and on up to threads - 1 others; returns when all calls have
// returned. Re-entrant: a caller that finds the pool busy runs its task alone.
void run_parallel(int threads, void (*task)(void*), void* context, const Threads& on = {});

// Tells the CPU that this thread is waiting in a loop; yields to other threads from time to time.
void relax(unsigned& spins);

}  // namespace secateur

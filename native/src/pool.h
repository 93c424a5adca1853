// Runs one task on several threads. The task takes its work from counters that the caller put into the
// context, so that any number of threads, even one, finishes it.
#pragma once

namespace secateur {

// Calls task(context) on the calling thread and on up to threads - 1 others; returns when all calls have
// returned. Re-entrant: a caller that finds the pool busy runs its task alone.
void run_parallel(int threads, void (*task)(void*), void* context);

// Tells the CPU that this thread is waiting in a loop; yields to other threads from time to time.
void relax(unsigned& spins);

}  // namespace secateur

// Runs a sweep, and exports the sizes of the structures.
#include "tables.h"
#include "team.h"

extern "C" void darts_sweep(const Record* records, int64_t count, int threads) {
  Team team(threads);
#pragma omp parallel num_threads(threads)
  {
#pragma omp master
    {
      for (const Record* record = records; record < records + count; ++record) record->function(record->call, team);
      team.end();
    }
    team.help();  // the caller comes here behind `end`, and returns at once
  }
}

// kernels/native/library.py compares these sizes with those of the Python structures.
#define DARTS_SIZE(STRUCTURE) \
  extern "C" int64_t darts_size_of_##STRUCTURE() { return sizeof(STRUCTURE); }
DARTS_SIZE(Matrix) DARTS_SIZE(Reader) DARTS_SIZE(Source) DARTS_SIZE(Task) DARTS_SIZE(SepConv) DARTS_SIZE(Candidate)
DARTS_SIZE(Mix) DARTS_SIZE(Shared) DARTS_SIZE(FanOut) DARTS_SIZE(Sum) DARTS_SIZE(Pool) DARTS_SIZE(Record)

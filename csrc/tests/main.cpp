// Runs every registered test, or those whose name contains the first argument. VATTENTION_SEED repeats a random run.
#include <chrono>
#include <cstdio>
#include <exception>
#include <string>

#include "check.h"

int main(int argc, char** argv) {
  const std::string wanted = argc > 1 ? argv[1] : "";
  int failures = 0, runs = 0;
  for (const vattention::test::Test& test : vattention::test::registry()) {
    if (test.name.find(wanted) == std::string::npos) continue;
    ++runs;
    const auto start = std::chrono::steady_clock::now();
    std::string outcome = "ok";
    try {
      test.run();
    } catch (const std::exception& error) {
      outcome = std::string("FAILED ") + error.what();
      ++failures;
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%-52s %6.2f s  %s\n", test.name.c_str(), seconds.count(), outcome.c_str());
  }
  std::printf("%d tests, %d failed\n", runs, failures);
  return failures == 0 && runs > 0 ? 0 : 1;
}

// A test is a function; a check that fails throws. No framework: the sanitizers are the point of these programs.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace vattention::test {

struct Test {
  std::string name;
  std::function<void()> run;
};

inline std::vector<Test>& registry() {
  static std::vector<Test> tests;
  return tests;
}

struct Register {
  Register(std::string name, std::function<void()> run) { registry().push_back({std::move(name), std::move(run)}); }
};

template <typename Exception, typename Call>
Exception expect_throw(Call call, const std::string& what) {
  try {
    call();
  } catch (const Exception& error) {
    return error;
  }
  throw std::runtime_error("nothing was thrown by " + what);
}

}  // namespace vattention::test

#define TEST(name)                                                         \
  static void name();                                                      \
  static const ::vattention::test::Register register_##name(#name, &name); \
  static void name()

#define CHECK(condition)                                                                                \
  do {                                                                                                  \
    if (!(condition))                                                                                   \
      throw std::runtime_error(std::string(__FILE__ ":") + std::to_string(__LINE__) + ": " #condition); \
  } while (false)

#define CHECK_EQUAL(actual, expected)                                                                       \
  do {                                                                                                      \
    const auto actual_value = (actual);                                                                     \
    const decltype(actual_value) expected_value = (expected);                                               \
    if (!(actual_value == expected_value)) {                                                                \
      throw std::runtime_error(std::string(__FILE__ ":") + std::to_string(__LINE__) + ": " #actual " is " + \
                               std::to_string(actual_value) + ", not " + std::to_string(expected_value));   \
    }                                                                                                       \
  } while (false)

#define CHECK_THROWS(Exception, call) ::vattention::test::expect_throw<Exception>([&] { call; }, #call)

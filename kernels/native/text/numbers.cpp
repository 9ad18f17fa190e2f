#include "numbers.h"

#include <charconv>
#include <cmath>
#include <string_view>

namespace dqrm {
namespace {

// Powers of ten that a double holds exactly.
constexpr double kPowers[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
                              1e8,  1e9,  1e10, 1e11, 1e12, 1e13, 1e14, 1e15,
                              1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};

bool is_digit(char c) { return c >= '0' && c <= '9'; }

std::string_view strip(const uint8_t* text, size_t bytes) {
  std::string_view view(reinterpret_cast<const char*>(text), bytes);
  const size_t begin = view.find_first_not_of(" \t");
  if (begin == std::string_view::npos) return {};
  return view.substr(begin, view.find_last_not_of(" \t") - begin + 1);
}

bool equal_ignoring_case(std::string_view text, std::string_view lower) {
  if (text.size() != lower.size()) return false;
  for (size_t i = 0; i < text.size(); ++i) {
    if ((text[i] | 0x20) != lower[i]) return false;
  }
  return true;
}

// The correctly rounded value of an unsigned decimal number, or infinity.
struct Decimal {
  bool valid = false;
  double value = 0.0;
};

Decimal parse_decimal(std::string_view text) {
  uint64_t mantissa = 0;    // the first 19 significant digits
  int64_t significant = 0;  // number of significant digits
  int64_t exponent = 0;     // of the last significant digit, from point and places alone
  bool any = false;
  bool point = false;
  size_t at = 0;
  for (; at < text.size(); ++at) {
    const char c = text[at];
    if (is_digit(c)) {
      any = true;
      significant += significant > 0 || c != '0';
      if (significant <= 19) mantissa = mantissa * 10 + uint64_t(c - '0');
      exponent -= point;
    } else if (c == '.' && !point) {
      point = true;
    } else {
      break;
    }
  }
  if (!any) return {};
  if (at < text.size()) {
    if ((text[at] | 0x20) != 'e') return {};
    ++at;
    const bool negative = at < text.size() && text[at] == '-';
    if (at < text.size() && (text[at] == '-' || text[at] == '+')) ++at;
    if (at == text.size()) return {};
    int64_t given = 0;
    for (; at < text.size(); ++at) {
      if (!is_digit(text[at])) return {};
      if (given < 1'000'000'000'000) given = given * 10 + (text[at] - '0');
    }
    exponent += negative ? -given : given;
  }
  if (mantissa == 0) return {true, 0.0};
  // Exact operands and one rounding: right by the definition of division and multiplication.
  if (significant <= 15 && exponent >= -22 && exponent <= 22) {
    const double digits = double(mantissa);
    return {true, exponent < 0 ? digits / kPowers[-exponent] : digits * kPowers[exponent]};
  }
  // The value lies between 10^(magnitude - 1) and 10^magnitude.
  const int64_t magnitude = significant + exponent;
  if (magnitude > 310) return {true, HUGE_VAL};
  if (magnitude < -330) return {true, 0.0};
  double value = 0.0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  // from_chars does not say on which side a value is out of range.
  if (error == std::errc::result_out_of_range) value = magnitude > 0 ? HUGE_VAL : 0.0;
  return {true, value};
}

// Two digits at `at`, or -1.
int two_digits(std::string_view text, size_t at) {
  if (!is_digit(text[at]) || !is_digit(text[at + 1])) return -1;
  return (text[at] - '0') * 10 + (text[at + 1] - '0');
}

bool is_leap(int year) { return year % 4 == 0 && (year % 100 != 0 || year % 400 == 0); }

int days_in_month(int year, int month) {
  constexpr int kDays[] = {31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31};
  return month == 2 && is_leap(year) ? 29 : kDays[month - 1];
}

// Days from 1970-01-01 in the Gregorian calendar; year >= 1.
int64_t days_since_epoch(int year, int month, int day) {
  const int64_t before = year - 1;
  int64_t days = before * 365 + before / 4 - before / 100 + before / 400;
  for (int m = 1; m < month; ++m) days += days_in_month(year, m);
  return days + day - 1 - 719162;
}

Parsed parse_iso_time(std::string_view text, double* value) {
  if (text.size() < 10 || text[4] != '-' || text[7] != '-') return Parsed::kMalformed;
  const int century = two_digits(text, 0);
  const int decade = two_digits(text, 2);
  const int month = two_digits(text, 5);
  const int day = two_digits(text, 8);
  const int year = century * 100 + decade;
  if (century < 0 || decade < 0 || year < 1 || month < 1 || month > 12 || day < 1 ||
      day > days_in_month(year, month)) {
    return Parsed::kMalformed;
  }
  int64_t seconds = days_since_epoch(year, month, day) * 86400;
  double fraction = 0.0;
  if (text.size() > 10) {
    if (text.size() < 19 || (text[10] != ' ' && text[10] != 'T') || text[13] != ':' ||
        text[16] != ':') {
      return Parsed::kMalformed;
    }
    const int hour = two_digits(text, 11);
    const int minute = two_digits(text, 14);
    const int second = two_digits(text, 17);
    if (hour < 0 || hour > 23 || minute < 0 || minute > 59 || second < 0 || second > 59) {
      return Parsed::kMalformed;
    }
    seconds += hour * 3600 + minute * 60 + second;
    std::string_view rest = text.substr(19);
    if (!rest.empty() && rest[0] == '.') {
      size_t end = 1;
      while (end < rest.size() && is_digit(rest[end])) ++end;
      if (end == 1) return Parsed::kMalformed;
      fraction = parse_decimal(rest.substr(0, end)).value;
      rest = rest.substr(end);
    }
    if (rest.size() == 6 && (rest[0] == '+' || rest[0] == '-') && rest[3] == ':') {
      const int hours = two_digits(rest, 1);
      const int minutes = two_digits(rest, 4);
      if (hours < 0 || hours > 23 || minutes < 0 || minutes > 59) return Parsed::kMalformed;
      const int offset = hours * 3600 + minutes * 60;
      seconds += rest[0] == '-' ? offset : -offset;
    } else if (!rest.empty() && rest != "Z") {
      return Parsed::kMalformed;
    }
  }
  *value = double(seconds) + fraction;
  return Parsed::kValue;
}

}  // namespace

Parsed parse_number(const uint8_t* text, size_t bytes, double* value) {
  std::string_view number = strip(text, bytes);
  if (number.empty()) return Parsed::kMissing;
  const bool negative = number[0] == '-';
  if (negative || number[0] == '+') number.remove_prefix(1);
  if (equal_ignoring_case(number, "nan")) return Parsed::kMissing;
  const Decimal decimal = parse_decimal(number);
  if (!decimal.valid || std::isinf(decimal.value)) return Parsed::kMalformed;
  *value = negative && decimal.value != 0.0 ? -decimal.value : decimal.value;
  return Parsed::kValue;
}

Parsed parse_label(const uint8_t* text, size_t bytes, float* value) {
  const std::string_view label = strip(text, bytes);
  if (label == "0" || label == "0.0") {
    *value = 0.0f;
  } else if (label == "1" || label == "1.0") {
    *value = 1.0f;
  } else {
    return Parsed::kMalformed;
  }
  return Parsed::kValue;
}

Parsed parse_time(const uint8_t* text, size_t bytes, double* value) {
  const Parsed number = parse_number(text, bytes, value);
  if (number == Parsed::kValue) return number;
  return parse_iso_time(strip(text, bytes), value);
}

}  // namespace dqrm

// What no program and no file shows: the edges of figures, ties, digests and readers.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "arguments.h"
#include "errors.h"
#include "figures.h"
#include "flatbuffer.h"
#include "memory.h"
#include "sample.h"
#include "sha256.h"

namespace dreamedge {
namespace {

const float NOT_A_NUMBER = std::nanf("");

Measured call(double db, double tie_margin = INF, double floor_db = INF) {
    return {"whole-000", 0, db, tie_margin, floor_db, ""};
}

TEST(SqnrDb, IsTheRatioOfTwoEnergies) {
    EXPECT_DOUBLE_EQ(sqnr_db({3, 4, 0, 0}, {3, 4, 0, 0.5F}, 2), 20.0);
    EXPECT_EQ(sqnr_db({1, 2}, {1, 2}, 2), IDENTICAL_DB);
    EXPECT_EQ(sqnr_db({0, 0}, {0, 1}, 2), -INF);
    EXPECT_TRUE(std::isnan(sqnr_db({1, 2}, {1, NOT_A_NUMBER}, 2)));
    EXPECT_TRUE(std::isnan(sqnr_db({1, 2}, {1, std::numeric_limits<float>::infinity()}, 2)));
    EXPECT_THROW(sqnr_db({1, 2}, {1}, 2), std::invalid_argument);
}

TEST(Fidelity, NotANumberIsTheWorstCallAndNeverOk) {
    const auto figures = fidelity({call(90), call(std::nan("")), call(70)}, {50, 50}, INF);
    EXPECT_TRUE(std::isnan(figures[0].value));
    EXPECT_FALSE(figures[0].ok());
    EXPECT_EQ(figures[0].json()["value"], "nan");
}

TEST(Fidelity, EachCallHasTheLowestOfItsBounds) {
    // The second is farther below its bound, though it has the higher figure.
    const auto figures = fidelity({call(20, 0, 15), call(25, 0)}, {30, 110}, INF);
    EXPECT_EQ(figures.size(), 1U);  // none is free of ties
    EXPECT_EQ(figures[0].value, 25);
    EXPECT_EQ(figures[0].bound, 30);
    // What rounding alone allows is no fault; with ties it says nothing of the calls that have one.
    EXPECT_TRUE(fidelity({call(40)}, {50, 50}, 39)[0].ok());
    EXPECT_FALSE(fidelity({call(40, 0), call(40)}, {50, 50}, 39)[0].ok());
}

TEST(Bounds, AreThoseOfTheProcessor) {
    const auto recipe = [](const char* native) {
        return parse_json(R"({"bounds": {"fidelity_db": 50, "fidelity_exact_db": 60, "native_float16_db": )" +
                          std::string(native) + "}}");
    };
    EXPECT_EQ(bounds_of(recipe("36"), true).fidelity_exact_db, 36);
    EXPECT_EQ(bounds_of(recipe("36"), false).fidelity_exact_db, 60);
    EXPECT_EQ(bounds_of(recipe("55"), true).fidelity_db, 50);
    EXPECT_EQ(bounds_of(recipe("null"), true).fidelity_db, 50);
    EXPECT_THROW(bounds_of(parse_json(R"({"bounds": {"fidelity_db": 50}})"), false), std::invalid_argument);
    EXPECT_THROW(bounds_of(recipe("\"low\""), true), std::invalid_argument);
    EXPECT_THROW(bounds_of(recipe("\"low\""), false), std::invalid_argument);
}

TEST(Sha256, IsTheStandards) {  // its own examples, and one that ends just before a block does
    const auto hex = [](const std::string& text) {
        Sha256 digest;
        for (const char& byte : text) digest.update(&byte, 1);
        return digest.hex();
    };
    EXPECT_EQ(hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    EXPECT_EQ(hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    EXPECT_EQ(hex("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
              "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    EXPECT_EQ(hex(std::string(1'000'000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sample, TakesTheLowestOfEqualTokensAndNeverTheMask) {
    Random random(0);
    const std::vector<float> logits{1, 3, 3, 9};
    EXPECT_EQ(sample(logits.data(), 4, {3, "maskgit_plus", 0, {}, {}}, random).token, 1);
    const std::vector<float> wrong{1, NOT_A_NUMBER, 3, 9};
    EXPECT_THROW(sample(wrong.data(), 4, {3, "maskgit_plus", 0, {}, {}}, random), Error);
}

TEST(Sample, TakesTheLeftmostOfEquallySurePositions) {
    Random random(0);
    EXPECT_EQ(most_confident({0.5F, 0.9F, 0.5F, 0.9F}, 3, 0, random), (std::vector<size_t>{1, 3, 0}));
}

TEST(Flatbuffer, IsReadInsideOfItsData) {
    EXPECT_EQ(piece("abc", 3, 0), "");
    EXPECT_THROW(piece("abc", 1, 3), std::invalid_argument);
    EXPECT_THROW(piece("abc", UINT64_MAX, 2), std::invalid_argument);
    EXPECT_THROW(number_at<uint32_t>("abc", 0), std::invalid_argument);
    EXPECT_THROW(Table::root(std::string(8, '\xff'), 0).number<uint32_t>(0), std::invalid_argument);
}

TEST(Memory, AFileThatIsGoneIsMappedNowhere) { EXPECT_TRUE(mapped("/nowhere/model.pte").empty()); }

TEST(Messages, AreOneLineThatNoTerminalObeys) {
    EXPECT_EQ(one_line("a\nb\x1b[31m").find_first_of("\n\x1b"), std::string::npos);
    EXPECT_LE(one_line(std::string(5000, 'x'), 100).size(), 103U);
    EXPECT_EQ(nearest("thread", {"threads", "steps"}), "; did you mean 'threads'?");
    EXPECT_EQ(nearest("zzzzzz", {"threads", "steps"}), "");
}

}  // namespace
}  // namespace dreamedge

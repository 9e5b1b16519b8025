// Inspects one image with a model that `diffad export MODEL model.xml` has written.
//
//   inspect model.xml part.ppm [category]
//
// The image is a binary PPM of the size that the model takes: resize it with antialiasing. A model of several
// categories takes the index of one. Prints the score and, of a calibrated model, the p-value and whether there is an
// alarm. Exits with 3 where there is one, with 0 where there is none, and with 1 after an error. A model with a
// smallest area gives the score alone: what is smaller, `diffad.deployment.Runtime` takes off.
#include <fstream>
#include <iostream>
#include <iterator>
#include <openvino/openvino.hpp>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

// Pixels of a binary PPM of 8 bits, (1, height, width, 3), as the model takes them: from 0 to 255, or in [0, 1].
ov::Tensor read_ppm(const std::string& path, const ov::Output<ov::Node>& input) {
    std::ifstream file(path, std::ios::binary);
    std::string magic;
    size_t width = 0, height = 0, largest = 0;
    file >> magic >> width >> height >> largest;
    file.get();
    const std::vector<unsigned char> bytes{std::istreambuf_iterator<char>(file), {}};
    if (magic != "P6" || largest != 255 || bytes.size() != width * height * 3)
        throw std::runtime_error(path + " is no PPM of 8 bits");
    const ov::PartialShape taken = input.get_partial_shape();  // (N, height, width, 3) of any N
    if (taken[1] != ov::Dimension(height) || taken[2] != ov::Dimension(width))
        throw std::runtime_error(path + " must have the size that the model takes, " + taken[2].to_string() + " x " +
                                 taken[1].to_string());
    ov::Tensor image(input.get_element_type(), {1, height, width, 3});
    for (size_t i = 0; i < bytes.size(); ++i) {
        if (input.get_element_type() == ov::element::u8)
            image.data<uint8_t>()[i] = bytes[i];
        else
            image.data<float>()[i] = bytes[i] / 255.0f;
    }
    return image;
}

// The index of one of the model's categories.
int64_t read_category(const char* word, int64_t count) {
    const std::string digits = word ? word : "";
    if (!digits.empty() && digits.size() < 10 && digits.find_first_not_of("0123456789") == std::string::npos)
        if (const int64_t index = std::stoll(digits); index < count) return index;
    throw std::runtime_error("CATEGORY must be an index below " + std::to_string(count) + ": this model knows " +
                             std::to_string(count) + " categories");
}

int inspect(const std::string& model_path, const std::string& image_path, const char* category) {
    ov::Core core;
    auto model = core.read_model(model_path);
    // float32, the precision of most calibrations: by itself, OpenVINO would take bfloat16 where a processor has it
    auto compiled = core.compile_model(model, "CPU", ov::hint::inference_precision(ov::element::f32));
    auto request = compiled.create_infer_request();
    request.set_tensor("image", read_ppm(image_path, model->input("image")));
    if (model->inputs().size() > 1) {
        ov::Tensor index(ov::element::i64, ov::Shape{});
        const int64_t count = std::stoll(model->get_rt_info<std::string>("diffad_categories"));
        index.data<int64_t>()[0] = read_category(category, count);
        request.set_tensor("category", index);
    } else if (category) {
        throw std::runtime_error("this model knows one category: leave CATEGORY out");
    }
    request.infer();
    std::cout << "score " << request.get_tensor("anomaly_score").data<float>()[0] << "\n";
    std::set<std::string> outputs;
    for (const auto& output : model->outputs()) outputs.insert(output.get_any_name());
    if (!outputs.count("is_anomalous")) return 0;
    const bool alarm = request.get_tensor("is_anomalous").data<bool>()[0];
    std::cout << "p_value " << request.get_tensor("p_value").data<float>()[0] << "\n"
              << "alarm " << alarm << "\n";
    return alarm ? 3 : 0;
}

int main(int argc, char** argv) {
    if (argc != 3 && argc != 4) {
        std::cerr << "usage: inspect MODEL.xml IMAGE.ppm [CATEGORY]\n";
        return 2;
    }
    try {
        return inspect(argv[1], argv[2], argc == 4 ? argv[3] : nullptr);
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << "\n";
        return 1;
    }
}

// Inspects one image with a model that `diffad export MODEL model.xml` has written.
//
//   inspect model.xml part.ppm
//
// The image is a binary PPM of the size that the model takes (its metadata's input_size): resize it with antialiasing.
// Prints the score, the p-value and whether there is an alarm, and exits with 3 where there is one.
#include <fstream>
#include <iostream>
#include <iterator>
#include <openvino/openvino.hpp>
#include <string>
#include <vector>

int main(int argc, char** argv) {
    if (argc != 3) {
        std::cerr << "usage: inspect MODEL.xml IMAGE.ppm\n";
        return 2;
    }
    ov::Core core;
    auto model = core.read_model(argv[1]);
    std::cout << "model " << model->get_rt_info<std::string>("diffad") << "\n";

    std::ifstream file(argv[2], std::ios::binary);
    std::string magic;
    size_t width = 0, height = 0, largest = 0;
    file >> magic >> width >> height >> largest;
    file.get();
    std::vector<unsigned char> bytes{std::istreambuf_iterator<char>(file), {}};
    if (magic != "P6" || largest != 255 || bytes.size() != width * height * 3) {
        std::cerr << argv[2] << " is no PPM of 8 bits\n";
        return 1;
    }

    ov::Tensor image(ov::element::f32, {1, height, width, 3});  // in [0, 1]
    for (size_t i = 0; i < bytes.size(); ++i) image.data<float>()[i] = bytes[i] / 255.0f;

    // float32: by itself, OpenVINO would take bfloat16 where a processor has it, which moves scores
    auto compiled = core.compile_model(model, "CPU", ov::hint::inference_precision(ov::element::f32));
    auto request = compiled.create_infer_request();
    request.set_tensor("image", image);
    request.infer();
    const bool alarm = request.get_tensor("is_anomalous").data<bool>()[0];
    std::cout << "score " << request.get_tensor("anomaly_score").data<float>()[0] << "\n"
              << "p_value " << request.get_tensor("p_value").data<float>()[0] << "\n"
              << "alarm " << alarm << "\n";
    return alarm ? 3 : 0;
}

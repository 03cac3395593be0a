//! A trained network as TorchScript: the evaluation pass, and the weights that it needs under the
//! reference's names. Plain torch operations, so that any PyTorch or libtorch runs it.
//!
//! Not here: files, and what belongs around the pass (preprocessing, arg-max).

use std::fmt::Write;

use tch::Kind;

use super::blocks::{EPS, SLOPE};
use super::{ModelError, Network, Role, UpMode};
use crate::bridge::ops::{ScriptTensor, script_module};

/// The bytes of a TorchScript file: `[N, in, H, W]` in float32, H and W multiples of 16, to
/// decoder 1's main logits `[N, C, H, W]`.
///
/// # Errors
/// Where libtorch does not compile the pass.
pub fn torchscript(net: &Network) -> Result<Vec<u8>, ModelError> {
    let mut tensors: Vec<ScriptTensor<'_>> = Vec::new();
    let parameters = net.params().parameters().map(|(name, t)| (name, t, Role::Parameter));
    let buffers = net.params().buffers().map(|(name, t)| (name, t, Role::Buffer));
    let decoder = net.first_decoder();
    let needed = |name: &str| is_needed(name, decoder);
    for (name, tensor, role) in parameters.chain(buffers).filter(|(name, ..)| needed(name)) {
        // Copied to the CPU and to float32, whatever the network was trained in.
        let tensor = tensor.f_detach()?.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Float)?;
        tensors.push((name, tensor, role == Role::Buffer));
    }
    Ok(script_module(&tensors, &source(net))?)
}

/// Decoder 2, the auxiliary heads and the counters play no part in inference.
fn is_needed(name: &str, decoder: &str) -> bool {
    let part = name.split('.').next().unwrap_or_default();
    (part == "encoder" || part == decoder)
        && !name.contains(".out_conv_dp")
        && !name.ends_with(".num_batches_tracked")
}

/// The source of `forward`.
fn source(net: &Network) -> String {
    let mut script = Script { lines: String::new(), values: 0 };
    let mut level = script.block("x", "encoder.in_conv.conv_conv");
    let mut levels = vec![level.clone()];
    for down in 1..=4 {
        let pooled = script
            .set(&format!("torch.max_pool2d({level}, [2, 2], [2, 2], [0, 0], [1, 1], False)"));
        level = script.block(&pooled, &format!("encoder.down{down}.maxpool_conv.1.conv_conv"));
        levels.push(level.clone());
    }
    let (mode, decoder) = (net.config().up[0], net.first_decoder());
    for up in 1..=4 {
        level = script.up(&level, &levels[4 - up], &format!("{decoder}.up{up}"), mode);
    }
    let logits = script.conv(&level, &format!("{decoder}.out_conv"), 1);
    format!("def forward(self, x):\n{}    return {logits}\n", script.lines)
}

/// Lines of source, each of which gives a value a name.
struct Script {
    lines: String,
    values: usize,
}

impl Script {
    fn set(&mut self, value: &str) -> String {
        self.values += 1;
        let name = format!("t{}", self.values);
        // Writing to a string cannot fail.
        let _ok = writeln!(self.lines, "    {name} = {value}");
        name
    }

    /// `[N, A, H, W] -> [N, B, H, W]`
    fn conv(&mut self, x: &str, name: &str, pad: i64) -> String {
        let place = path(name);
        self.set(&format!(
            "torch.conv2d({x}, {place}.weight, {place}.bias, [1, 1], [{pad}, {pad}], [1, 1], 1)"
        ))
    }

    fn norm_act(&mut self, x: &str, name: &str) -> String {
        let place = path(name);
        let norm = self.set(&format!(
            "torch.batch_norm({x}, {place}.weight, {place}.bias, {place}.running_mean, \
             {place}.running_var, False, 0.1, {EPS}, True)"
        ));
        self.set(&format!("torch.leaky_relu({norm}, {SLOPE})"))
    }

    /// A `ConvBlock`.
    fn block(&mut self, x: &str, name: &str) -> String {
        let first = self.conv(x, &format!("{name}.0"), 1);
        let first = self.norm_act(&first, &format!("{name}.1"));
        let second = self.conv(&first, &format!("{name}.4"), 1);
        self.norm_act(&second, &format!("{name}.5"))
    }

    /// An `UpBlock`: deep `[N, D, H/2, W/2]`, skip `[N, S, H, W]` -> `[N, S, H, W]`.
    fn up(&mut self, deep: &str, skip: &str, name: &str, mode: UpMode) -> String {
        let size = format!("[{skip}.size(2), {skip}.size(3)]");
        let mut resized = |what: &str, rest: &str| {
            let low = self.conv(deep, &format!("{name}.conv1x1"), 0);
            self.set(&format!("torch.upsample_{what}2d({low}, {size}{rest})"))
        };
        let up = match mode {
            UpMode::Nearest => resized("nearest", ""),
            UpMode::Bilinear => resized("bilinear", ", True"),
            UpMode::Bicubic => resized("bicubic", ", True"),
            UpMode::Transposed => {
                let place = path(&format!("{name}.up"));
                self.set(&format!(
                    "torch.conv_transpose2d({deep}, {place}.weight, {place}.bias, [2, 2], [0, 0], \
                     [0, 0], 1, [1, 1])"
                ))
            }
        };
        let joined = self.set(&format!("torch.cat([{skip}, {up}], 1)"));
        self.block(&joined, &format!("{name}.conv.conv_conv"))
    }
}

/// `encoder.in_conv.0` as an expression: a number is no attribute's name in the language.
fn path(name: &str) -> String {
    name.split('.').fold("self".to_owned(), |place, part| {
        match part.starts_with(|first: char| first.is_ascii_digit()) {
            true => format!("getattr({place}, \"{part}\")"),
            false => format!("{place}.{part}"),
        }
    })
}

#[cfg(test)]
mod tests {
    use tch::{CModule, Device, Tensor};

    use super::*;
    use crate::model::{Draws, Heads, NetworkConfig, Precision};

    /// A network whose running statistics are not the initial ones.
    fn net(up: Vec<UpMode>, precision: Precision) -> Network {
        let config =
            NetworkConfig { widths: [4, 8, 8, 16, 16], up, precision, ..NetworkConfig::default() };
        let net = Network::new(config, Device::Cpu, 5).unwrap();
        let kind = (Kind::Float, Device::Cpu);
        for step in 0..3 {
            let x = Tensor::rand([2, 1, 32, 32], kind) * 3.0 + 1.0;
            let out = net.forward_train(&x, &Draws::keyed(1, step, 0), Heads::Main, None).unwrap();
            out.statistics.commit().unwrap();
        }
        net
    }

    #[test]
    fn a_module_gives_the_logits_of_the_network_it_was_made_from() {
        for mode in [UpMode::Bilinear, UpMode::Transposed, UpMode::Nearest, UpMode::Bicubic] {
            for precision in [Precision::F32, Precision::F64] {
                // A U-Net's lone decoder has another name.
                let up = if mode == UpMode::Bilinear && precision == Precision::F64 {
                    vec![mode]
                } else {
                    vec![mode, UpMode::Transposed]
                };
                let net = net(up, precision);
                let bytes = torchscript(&net).unwrap();
                let module = CModule::load_data(&mut bytes.as_slice()).unwrap();
                for size in [[3, 1, 32, 32], [1, 1, 48, 16]] {
                    let x = Tensor::rand(size, (Kind::Float, Device::Cpu)) * 2.0;
                    let ours = net.forward_eval(&x).unwrap().to_kind(Kind::Float);
                    let theirs = module.forward_ts(&[&x]).unwrap();
                    assert_eq!(theirs.size(), ours.size());
                    let far = (&theirs - &ours).abs().max().double_value(&[]);
                    let scale = ours.abs().max().double_value(&[]);
                    assert!(far <= 1e-5 * scale.max(1.0), "{mode:?}: {far} of {scale}");
                }
            }
        }
    }

    #[test]
    fn the_same_network_makes_the_same_bytes_and_keeps_the_names() {
        let net = net(vec![UpMode::Bilinear, UpMode::Transposed], Precision::F32);
        let bytes = torchscript(&net).unwrap();
        assert_eq!(bytes, torchscript(&net).unwrap());
        let module = CModule::load_data(&mut bytes.as_slice()).unwrap();
        let names: Vec<String> =
            module.named_parameters().unwrap().into_iter().map(|(name, _)| name).collect();
        let wanted =
            net.params().parameters().map(|(name, _)| name).filter(|n| is_needed(n, "decoder1"));
        let wanted: Vec<&str> = wanted.collect();
        assert!(wanted.contains(&"encoder.down1.maxpool_conv.1.conv_conv.0.weight"));
        for name in &wanted {
            assert!(names.iter().any(|n| n == name), "{name} is missing in {names:?}");
        }
        assert!(names.iter().all(|name| !name.starts_with("decoder2")), "{names:?}");
    }
}

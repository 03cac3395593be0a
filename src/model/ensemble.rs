//! The networks that a method trains together: students, each with its optimiser, and perhaps a
//! teacher that follows the first student as an exponential moving average of its weights.
//!
//! The first student is the one that is evaluated, exported and whose tensors carry the bare
//! names; the others' have a prefix. Not here: what is computed with them (the `method` module).

use tch::{Device, Tensor};

use super::network::{Heads, Network, NetworkConfig};
use super::params::{HostTensor, to_host};
use super::perturb::key_of;
use super::sgd::Sgd;
use super::{ModelError, Statistics};
use crate::bridge::ops;

/// What stands before the names of the second student's tensors.
const SECOND: &str = "second.";
/// What stands before the names of the teacher's.
const TEACHER: &str = "teacher.";

/// How many networks a method works with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cast {
    /// Two students, drawn from different seeds.
    pub two_students: bool,
    /// A teacher that follows the first.
    pub teacher: bool,
}

#[derive(Debug)]
struct Student {
    prefix: &'static str,
    net: Network,
    sgd: Sgd,
}

/// The networks and their optimisers.
#[derive(Debug)]
pub struct Ensemble {
    students: Vec<Student>,
    teacher: Option<Network>,
}

impl Ensemble {
    /// Fresh networks of one configuration; the teacher begins as the first student. `sgd` is an
    /// optimiser without any momentum yet.
    ///
    /// # Errors
    /// A configuration that makes no network.
    pub fn new(
        config: &NetworkConfig,
        cast: Cast,
        device: Device,
        seed: u64,
        sgd: &Sgd,
    ) -> Result<Self, ModelError> {
        let student = |prefix, seed| -> Result<Student, ModelError> {
            let net = Network::new(config.clone(), device, seed)?;
            Ok(Student { prefix, net, sgd: sgd.fresh() })
        };
        let mut students = vec![student("", seed)?];
        if cast.two_students {
            students.push(student(SECOND, key_of("second student", &[seed]))?);
        }
        let teacher =
            cast.teacher.then(|| Network::new(config.clone(), device, seed)).transpose()?;
        Ok(Self { students, teacher })
    }

    /// The first student: what is evaluated.
    #[must_use]
    pub fn main(&self) -> &Network {
        &self.students[0].net
    }

    /// All students, the first one first.
    pub fn students(&self) -> impl Iterator<Item = &Network> {
        self.students.iter().map(|student| &student.net)
    }

    /// The teacher, if the method has one.
    #[must_use]
    pub fn teacher(&self) -> Option<&Network> {
        self.teacher.as_ref()
    }

    /// The students' parameters that get a gradient with these heads, in order: what a reducer is
    /// built over.
    #[must_use]
    pub fn trained(&self, heads: Heads) -> Vec<Tensor> {
        let mut all = Vec::new();
        for net in self.students() {
            let names = net.trained(heads);
            all.extend(
                names.iter().filter_map(|name| net.params().get(name)).map(Tensor::shallow_clone),
            );
        }
        all
    }

    /// Unsets every gradient.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn clear_gradients(&self) -> Result<(), ModelError> {
        let all: Vec<Tensor> = self
            .students()
            .flat_map(|net| net.params().parameters().map(|(_, t)| t.shallow_clone()))
            .collect();
        Ok(ops::grads_to_none(&all)?)
    }

    /// One step of every optimiser at a learning rate, then the running statistics.
    ///
    /// # Errors
    /// Where libtorch fails; parameters are then in an undefined state between two steps.
    pub fn step(&mut self, lr: f64, statistics: Vec<Statistics>) -> Result<(), ModelError> {
        for student in &mut self.students {
            student.sgd.lr = lr;
            student.sgd.step(student.net.params())?;
        }
        statistics.into_iter().try_for_each(Statistics::commit)
    }

    /// The teacher's weights and running statistics become `decay` times their own plus
    /// (1 - decay) times the first student's. Every rank does the same arithmetic on the same
    /// numbers, so teachers stay equal without talking.
    ///
    /// # Errors
    /// Where libtorch fails.
    pub fn follow(&self, decay: f64) -> Result<(), ModelError> {
        let Some(teacher) = &self.teacher else { return Ok(()) };
        let student = self.main().params();
        tch::no_grad(|| {
            let tensors = teacher.params().parameters().chain(teacher.params().buffers());
            for (name, tensor) in tensors {
                let source =
                    student.get(name).ok_or_else(|| ModelError::Missing(name.to_owned()))?;
                let mut tensor = tensor.shallow_clone();
                if !tensor.is_floating_point() || decay == 0.0 {
                    tensor.f_copy_(source)?;
                    continue;
                }
                let _same = tensor.f_mul_scalar_(decay)?;
                let _same = tensor.f_add_(&source.f_mul_scalar(1.0 - decay)?)?;
            }
            Ok(())
        })
    }

    fn named(&self) -> impl Iterator<Item = (&'static str, &Network)> {
        let students = self.students.iter().map(|s| (s.prefix, &s.net));
        students.chain(self.teacher.iter().map(|t| (TEACHER, t)))
    }

    /// All networks' tensors in order, the others' names behind their prefix.
    pub(super) fn state(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.named().flat_map(|(prefix, net)| {
            net.params().all().map(move |(name, tensor)| (format!("{prefix}{name}"), tensor))
        })
    }

    /// The optimisers' tensors, named likewise.
    pub(super) fn momentum(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.students.iter().flat_map(|student| {
            let buffers = student.sgd.buffers();
            buffers.map(|(name, tensor)| (format!("{}{name}", student.prefix), tensor))
        })
    }

    /// The networks' states as bytes.
    ///
    /// # Errors
    /// Where a tensor cannot be copied to the host.
    pub fn to_host(&self) -> Result<Vec<HostTensor>, ModelError> {
        self.state().map(|(name, tensor)| to_host(&name, tensor)).collect()
    }

    /// The optimisers' states as bytes.
    ///
    /// # Errors
    /// Where a tensor cannot be copied to the host.
    pub fn momentum_to_host(&self) -> Result<Vec<HostTensor>, ModelError> {
        self.momentum().map(|(name, tensor)| to_host(&name, tensor)).collect()
    }

    /// Takes over what [`Ensemble::to_host`] and [`Ensemble::momentum_to_host`] gave.
    ///
    /// # Errors
    /// A tensor that is missing, unknown or unfit.
    pub fn load_host(
        &mut self,
        state: Vec<HostTensor>,
        momentum: Vec<HostTensor>,
    ) -> Result<(), ModelError> {
        let mut states = Split::of(state);
        for (prefix, net) in self.named() {
            net.params().load_host(&states.take(prefix))?;
        }
        states.finish()?;
        let mut momenta = Split::of(momentum);
        for student in &mut self.students {
            let own = momenta.take(student.prefix);
            student.sgd.load_host(student.net.params(), &own)?;
        }
        momenta.finish()
    }

    /// Starts the first student, and the teacher, from given weights.
    ///
    /// # Errors
    /// A tensor that is missing, unknown or unfit.
    pub fn start_from(&self, state: &[HostTensor]) -> Result<(), ModelError> {
        self.main().params().load_host(state)?;
        self.follow(0.0)
    }
}

/// What a state holds of the first student alone: the tensors without a prefix.
#[must_use]
pub fn main_state(state: Vec<HostTensor>) -> Vec<HostTensor> {
    Split::of(state).take("")
}

/// A state by prefix.
struct Split {
    parts: Vec<(&'static str, Vec<HostTensor>)>,
}

impl Split {
    fn of(state: Vec<HostTensor>) -> Self {
        let mut parts = vec![(SECOND, Vec::new()), (TEACHER, Vec::new()), ("", Vec::new())];
        for tensor in state {
            // The bare names come last: every name begins with nothing.
            for (prefix, part) in &mut parts {
                if let Some(name) = tensor.name.strip_prefix(*prefix) {
                    part.push(HostTensor { name: name.to_owned(), ..tensor });
                    break;
                }
            }
        }
        Self { parts }
    }

    fn take(&mut self, wanted: &str) -> Vec<HostTensor> {
        let part = self.parts.iter_mut().find(|(prefix, _)| *prefix == wanted);
        part.map(|(_, tensors)| std::mem::take(tensors)).unwrap_or_default()
    }

    /// Refuses what nobody took.
    fn finish(self) -> Result<(), ModelError> {
        for (prefix, part) in self.parts {
            if let Some(tensor) = part.first() {
                return Err(ModelError::Unknown(format!("{prefix}{}", tensor.name)));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::StateCopy;
    use tch::Kind;

    fn ensemble(two_students: bool, teacher: bool) -> Ensemble {
        let config = NetworkConfig {
            widths: [2, 2, 2, 2, 2],
            up: vec![crate::model::UpMode::Bilinear],
            pyramid: false,
            ..NetworkConfig::default()
        };
        let cast = Cast { two_students, teacher };
        Ensemble::new(&config, cast, Device::Cpu, 7, &Sgd::new(0.1, 0.9, 0.0)).unwrap()
    }

    fn weight(net: &Network) -> Tensor {
        net.params().get("decoder.out_conv.weight").unwrap().detach().copy()
    }

    #[test]
    fn a_teacher_is_the_moving_average_of_its_student() {
        let all = ensemble(false, true);
        let (first, teacher) = (weight(all.main()), all.teacher().unwrap());
        assert_eq!(weight(teacher), first);
        tch::no_grad(|| {
            let mut w = all.main().params().get("decoder.out_conv.weight").unwrap().shallow_clone();
            let _w = w.f_add_scalar_(1.0).unwrap();
        });
        all.follow(0.75).unwrap();
        let moved = (weight(teacher) - &first).mean(Kind::Double).double_value(&[]);
        assert!((moved - 0.25).abs() < 1e-6, "{moved}");
        all.follow(0.0).unwrap();
        assert_eq!(weight(teacher), weight(all.main()));
    }

    #[test]
    fn a_state_holds_every_network_and_the_first_by_bare_names() {
        let all = ensemble(true, true);
        let mut nets = all.students();
        assert_ne!(weight(nets.next().unwrap()), weight(nets.next().unwrap()));
        drop(nets);
        let state = all.to_host().unwrap();
        assert_eq!(main_state(state.clone()), all.main().params().to_host().unwrap());
        let mut other = ensemble(true, true);
        tch::no_grad(|| {
            for (_, t) in other.main().params().parameters() {
                let _t = t.shallow_clone().f_zero_().unwrap();
            }
        });
        other.load_host(state.clone(), Vec::new()).unwrap();
        assert_eq!(other.to_host().unwrap(), state);
        // One network more or less is refused by name.
        let refused = ensemble(true, false).load_host(state.clone(), Vec::new()).unwrap_err();
        assert!(refused.to_string().contains("'teacher."), "{refused}");
        let single = ensemble(false, false).to_host().unwrap();
        assert!(matches!(
            ensemble(true, false).load_host(single, Vec::new()),
            Err(ModelError::Missing(_))
        ));
    }

    #[test]
    fn a_copy_is_the_state_when_it_was_taken_and_can_be_used_again() {
        let mut all = ensemble(true, true);
        let mut copy = StateCopy::default();
        for round in 0..2 {
            all.copy_state(&mut copy).unwrap();
            let then = (all.to_host().unwrap(), all.momentum_to_host().unwrap());
            assert_eq!(then.1.is_empty(), round == 0, "momentum comes with the first step");
            let bytes = then.0.iter().chain(&then.1).map(|t| t.bytes.len()).sum::<usize>();
            assert_eq!(copy.bytes(), bytes);
            let w = all.main().params().get("decoder.out_conv.weight").unwrap();
            let loss = (w * w).sum(Kind::Float);
            ops::backward(&[loss.shallow_clone()], &[loss.ones_like()]).unwrap();
            all.step(0.5, Vec::new()).unwrap();
            assert_ne!(all.to_host().unwrap(), then.0);
            assert_eq!(copy.to_host().unwrap(), then);
        }
    }
}

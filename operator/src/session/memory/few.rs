//! A few things by name, one as a rule: a map would keep room for four.

/// Something with a name of its own.
pub trait Named {
    /// The name.
    fn name(&self) -> &str;
}

/// Things in the order of their names.
#[derive(Debug)]
pub struct Few<T>(Vec<T>);

impl<T> Default for Few<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Named + PartialEq> Few<T> {
    fn find(&self, name: &str) -> Result<usize, usize> {
        self.0.binary_search_by(|thing| thing.name().cmp(name))
    }

    /// The one of this name.
    pub fn get(&self, name: &str) -> Option<&T> {
        self.find(name).ok().and_then(|at| self.0.get(at))
    }

    /// Puts one in the place of what has its name; answers whether that changes anything.
    pub fn put(&mut self, thing: T) -> bool {
        match self.find(thing.name()) {
            Ok(at) => {
                let new = self.0[at] != thing;
                self.0[at] = thing;
                new
            }
            Err(at) => {
                if self.0.len() < 4 {
                    self.0.reserve_exact(1);
                }
                self.0.insert(at, thing);
                true
            }
        }
    }

    /// Takes the one of this name away; answers whether there was one.
    pub fn remove(&mut self, name: &str) -> bool {
        let found = self.find(name).map(|at| self.0.remove(at)).is_ok();
        if found && self.0.len() < 4 {
            self.0.shrink_to_fit();
        }
        found
    }

    /// Takes away what is not of these names.
    pub fn retain(&mut self, is_there: impl Fn(&str) -> bool) {
        self.0.retain(|thing| is_there(thing.name()));
        self.0.shrink_to_fit();
    }

    /// All.
    pub fn iter(&self) -> std::slice::Iter<'_, T> {
        self.0.iter()
    }

    /// All, to be changed.
    pub fn iter_mut(&mut self) -> std::slice::IterMut<'_, T> {
        self.0.iter_mut()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug, PartialEq)]
    struct Thing(String, u8);

    impl Named for Thing {
        fn name(&self) -> &str {
            &self.0
        }
    }

    proptest! {
        #[test]
        fn a_few_are_what_a_map_would_have(happenings in prop::collection::vec((0..7_u8, 0..3_u8, any::<bool>()), 0..60)) {
            let (mut few, mut map) = (Few::default(), BTreeMap::new());
            for (name, value, put) in happenings {
                let name = name.to_string();
                if put {
                    let before = map.insert(name.clone(), value);
                    prop_assert_eq!(few.put(Thing(name, value)), before != Some(value));
                } else if value == 0 {
                    few.retain(|other| *other != name);
                    map.remove(&name);
                } else {
                    prop_assert_eq!(few.remove(&name), map.remove(&name).is_some());
                }
                let things: Vec<_> = map.iter().map(|(name, value)| Thing(name.clone(), *value)).collect();
                prop_assert_eq!(few.iter().cloned().collect::<Vec<_>>(), things);
                prop_assert_eq!((few.len(), few.is_empty()), (map.len(), map.is_empty()));
            }
        }
    }

    #[test]
    fn one_takes_the_room_of_one() {
        let mut few = Few::default();
        few.put(Thing("a".into(), 1));
        assert_eq!(few.0.capacity(), 1);
    }
}
